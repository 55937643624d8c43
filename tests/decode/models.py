"""Small plain models with random weights, and their decoders."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_mtp.decode.model import Decoder
from tests.model.plain_to_config import run_config
from tests.reference.plain_model import LatentConfig, MoEConfig, PlainConfig, PlainMTPModel
from tests.reference.weights import weights_as_megatron

DENSE = PlainConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_groups=2,
    vocab_size=50,
    padded_vocab_size=64,
    ffn_size=48,
    qk_norm=True,
    num_depths=3,
)
MOE = replace(
    DENSE,
    moe=MoEConfig(num_experts=4, topk=2, ffn_size=24, shared_ffn_size=16, score_function="sigmoid", expert_bias=True),
)
LATENT = LatentConfig(q_lora_rank=16, kv_lora_rank=12, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=6)
MLA = replace(
    DENSE,
    num_groups=None,
    qk_norm=False,
    latent=LATENT,
    moe=MoEConfig(
        num_experts=8,
        topk=2,
        ffn_size=24,
        shared_ffn_size=16,
        num_groups=4,
        group_topk=2,
        score_function="sigmoid",
        scaling_factor=2.5,
    ),
    moe_layers=(False, True),
)
VARIANTS = {
    "dense": DENSE,
    "moe": MOE,
    "mla": MLA,
    "tied_biased_partial_rope": replace(DENSE, tied=True, bias=True, rope_percent=0.5),
    "layer_norm_gelu": replace(DENSE, normalization="LayerNorm", activation="gelu", gated=False, qk_norm=False),
    "zero_centered": replace(DENSE, zero_centered_gamma=True, qkv_bias=True),
    "no_positions": replace(DENSE, rope_base=None),
    "softmax_router": replace(
        DENSE, moe=MoEConfig(num_experts=4, topk=2, ffn_size=24, shared_ffn_size=16, shared_gate=True)
    ),
    "pre_softmax_router": replace(DENSE, moe=MoEConfig(num_experts=4, topk=3, ffn_size=24, pre_softmax=True)),
    "mla_without_query_latent": replace(MLA, latent=replace(LATENT, q_lora_rank=None, latent_norms=False)),
    "repeated": replace(DENSE, mtp_repeated=True),
    "moe_dense_depths": replace(MOE, mtp_ffn_size=40),
    "parallel": replace(DENSE, mtp_variant="parallel"),
    "pre_final_norm": replace(DENSE, mtp_hidden="pre_final_norm"),
}


def plain_model(plain: PlainConfig, seed: int = 3) -> PlainMTPModel:
    """The reference, in fp32 weights that fp64 holds exactly."""
    model = PlainMTPModel(plain)
    model.randomize(seed=seed, std=0.15)
    return model


def decoder_of(model: PlainMTPModel) -> Decoder:
    """The decoder with the same weights, fp32 on the CPU."""
    cfg = run_config(model.cfg, 1, 1)
    return Decoder.build(cfg.model, {name: w.float() for name, w in weights_as_megatron(model).items()})


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = 50) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
