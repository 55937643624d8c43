"""Megatron-Core's gated delta net, on any device, with gradients that are right under tensor parallelism.

Four things differ from Megatron-Core 0.19.2:

1. Upstream refuses to build it without flash-linear-attention, whose kernels need a GPU, though it has a path in plain
   PyTorch for `deterministic_mode`. That path is used here on CPUs, and on GPUs when train.deterministic asks for it.
2. The output norm is shared by all heads, and each tensor-parallel rank holds some of them. Without sequence
   parallelism upstream never sums its gradient over the ranks.
3. With `layernorm_zero_centered_gamma` upstream stores the output norm as (weight - 1) too. Released weights hold the
   weight itself (Qwen3-Next), so it is stored plain here and kept without rounding.
4. The recurrence in plain PyTorch is our own. Upstream's loses the gradient of the decay to rounding (2e-4 relative in
   fp32, 2e-7 here), and loops over the rows of a chunk where this one solves a triangular system.
"""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mtp.errors import UnsupportedError
from megatron_mtp.mcore.linear_attention import has_flash_linear_attention, pretend_flash_linear_attention
from megatron_mtp.model.torch_backend.norm import TorchNorm


class PlainNorm(TorchNorm):
    """A norm that stores its weight as it is, whatever the model's other norms do."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object):
        config = copy(config)
        config.layernorm_zero_centered_gamma = False
        super().__init__(config, hidden_size, eps, **kwargs)


class ExactGatedDeltaNet(GatedDeltaNet):
    """Linear attention with the gated delta rule: a state of [key, value] for each head is decayed, corrected and read.

    Heads are sharded over TP, and over CP inside the layer, where each rank sees the full sequence.

    Source: Yang et al. 2024, arXiv 2412.06464; Qwen3-Next in transformers 5.23.
    """

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object):
        if not _uses_kernels(config):
            config = copy(config)
            config.deterministic_mode = True  # the name of the path in plain PyTorch
        with pretend_flash_linear_attention():
            super().__init__(config, *args, **kwargs)
        if self.config.deterministic_mode:
            self.gated_delta_rule = chunked_gated_delta_rule

    def _prepare_input_for_gated_delta_rule(
        self, qkv: Tensor, gate: Tensor, batch: int, seq_len: int, *gate_feats: Tensor
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values as heads: queries and keys have length 1, repeated over a group's value heads.

        Args:
            qkv: [b, s, (2 * keys + values)/(tp*cp)], after the convolution.
            gate: [b, s, heads/(tp*cp), value width].

        Returns:
            query, key [b, s, heads/(tp*cp), key width]; value [b, s, heads/(tp*cp), value width]; gate; gate_feats.
        """
        if not self.config.deterministic_mode:
            return super()._prepare_input_for_gated_delta_rule(qkv, gate, batch, seq_len, *gate_feats)
        shards = self.tp_size * self.cp_size
        query, key, value = qkv.split([self.qk_dim // shards, self.qk_dim // shards, self.v_dim // shards], dim=-1)
        repeats = self.num_value_heads // self.num_key_heads
        query, key = (
            _unit(x.unflatten(-1, (-1, self.key_head_dim))).repeat_interleave(repeats, dim=2) for x in (query, key)
        )
        return query, key, value.unflatten(-1, (-1, self.value_head_dim)), gate, *gate_feats

    def _apply_gated_norm(self, x: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm of heads times silu(gate), in fp32: [b, s, heads, value width] -> [b * s * heads, value width]."""
        weight = self.out_norm.weight
        if not self.config.sequence_parallel:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        width = x.shape[-1]
        y = F.rms_norm(x.reshape(-1, width).float(), (width,), weight.float(), self.out_norm.eps)
        return (y * F.silu(gate.reshape(-1, width).float())).to(x.dtype)


def chunked_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, chunk: int = 64, **unused: object
) -> tuple[Tensor, None]:
    """S_t = a_t S_{t-1} (1 - b_t k_t k_t^T) + b_t v_t k_t^T and o_t = S_t q_t / sqrt(key width), a = exp(g), by chunks.

    Logarithms of decays are summed in fp64: they reach hundreds within a chunk, and only their differences are used.

    Args:
        query, key: [b, s, heads, key width], of length 1.
        value: [b, s, heads, value width].
        g: [b, s, heads], at most 0.
        beta: [b, s, heads], from 0 to 1.
        chunk: tokens of one chunk.

    Returns:
        [b, s, heads, value width] in query's dtype, computed in fp32; and None in place of the last state.

    Source: Yang et al. 2024, arXiv 2412.06464, section 3.3 (the WY form).
    """
    seq_len, dtype, width = query.shape[1], query.dtype, key.shape[-1]
    query, key, value, beta, g = (_chunks(x, chunk) for x in (query, key, value, beta, g))
    total = g.double().cumsum(-1)  # [b, heads, chunks, chunk]
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril().float()
    from_start, to_end = total.exp().float()[..., None], (total[..., -1:] - total).exp().float()[..., None]
    chunk_decay = total[..., -1, None, None].exp().float()
    weighted = key * beta[..., None]
    system = (weighted @ key.mT * decay).tril(-1)
    both = torch.cat([value * beta[..., None], weighted * from_start], dim=-1)
    solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    writes, reads = solved.split([value.shape[-1], width], dim=-1)
    query = query / width**0.5
    scores, query, key = query @ key.mT * decay, query * from_start, key * to_end
    state, outputs = key.new_zeros(*key.shape[:2], width, value.shape[-1]), []
    for idx in range(key.shape[2]):
        new = writes[:, :, idx] - reads[:, :, idx] @ state
        outputs.append(query[:, :, idx] @ state + scores[:, :, idx] @ new)
        state = state * chunk_decay[:, :, idx] + key[:, :, idx].mT @ new
    out = torch.stack(outputs, dim=2).flatten(2, 3)[:, :, :seq_len]
    return out.transpose(1, 2).to(dtype), None


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[b, s, heads, ...] -> [b, heads, chunks, chunk, ...] in fp32, padded with zeros: no decay, nothing written."""
    x = x.transpose(1, 2).float()
    return F.pad(x, (0, 0) * (x.dim() - 3) + (0, -x.shape[2] % chunk)).unflatten(2, (-1, chunk))


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def _uses_kernels(config: TransformerConfig) -> bool:
    device = torch.empty(0, device=torch.cuda.current_device()).device.type
    if config.deterministic_mode or device != "cuda":
        return False
    if not has_flash_linear_attention():
        raise UnsupportedError(
            "model.experimental_attention_variant = 'gated_delta_net': on a GPU its kernels come from "
            "flash-linear-attention, which is not installed. Install flash-linear-attention, or set "
            "train.deterministic = True for the slow form in plain PyTorch."
        )
    return True
