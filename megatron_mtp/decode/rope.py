"""Rotations of all positions as complex numbers: rotating a pair of coordinates is one multiplication.

In this package the coordinates of a pair are adjacent. Megatron-Core's dense layers pair coordinate j with j + width/2;
`pair_order` sorts the rows of their query and key projections. Products of queries and keys do not change.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from torch import Tensor

from megatron_mtp.config.sections import ModelConfig


def rotations(model: ModelConfig, positions: int, device: torch.device) -> Tensor | None:
    """[positions, width / 2] complex64, 1 for pairs that are not rotated; None for models without positions.

    The angles come from Megatron-Core, which implements the scalings (Llama 3.1, YaRN).
    """
    if model.multi_latent_attention:
        (angles, factor), width = _latent_angles(model, positions), model.qk_pos_emb_head_dim
    elif model.position_embedding_type == "rope":
        embedding = RotaryEmbedding(
            kv_channels=model.kv_channels,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            rope_scaling=model.rope_scaling,
            rope_scaling_factor=model.rope_scaling_factor,
            use_cpu_initialization=True,
        )
        angles, factor, width = embedding.get_freqs_non_repeated(positions), 1.0, model.kv_channels
    else:
        return None
    turned = torch.polar(torch.full_like(angles, factor), angles)
    still = torch.ones(positions, width // 2 - angles.shape[1], dtype=turned.dtype)
    return torch.cat((turned.cpu(), still), dim=1).to(device)


def _latent_angles(model: ModelConfig, positions: int) -> tuple[Tensor, float]:
    if model.rope_type == "rope":
        embedding = RotaryEmbedding(
            kv_channels=model.qk_pos_emb_head_dim,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            use_cpu_initialization=True,
        )
        return embedding.get_freqs_non_repeated(positions), 1.0
    embedding = YarnRotaryEmbedding(
        model.qk_pos_emb_head_dim,
        rotary_base=model.rotary_base,
        scaling_factor=model.rotary_scaling_factor,
        original_max_position_embeddings=model.original_max_position_embeddings,
        beta_fast=model.beta_fast,
        beta_slow=model.beta_slow,
        mscale=model.mscale,
        mscale_all_dim=model.mscale_all_dim,
        use_cpu_initialization=True,
    )
    doubled, factor = embedding(positions)  # [positions, 1, 1, width], the angles twice
    return doubled[:, 0, 0].chunk(2, dim=-1)[0].float(), float(factor)


def pair_order(width: int, rotary_percent: float) -> list[int]:
    """Old index of each coordinate of a head, in the order with adjacent pairs.

    With width 8 and rotary_percent 0.5: [0, 2, 1, 3, 4, 5, 6, 7].
    """
    rotated = int(width * rotary_percent)
    pairs = [index for j in range(rotated // 2) for index in (j, j + rotated // 2)]
    return pairs + list(range(rotated, width))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates x [n, heads, width] by rotation [n, 1, width / 2], in fp32."""
    # A slice may begin at an odd offset, which complex numbers cannot; a copy begins at 0.
    copied = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(copied.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
