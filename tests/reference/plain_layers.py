"""One transformer block as formulas: norms, RoPE, attention with an explicit mask, MLA, feed-forward.

Shapes are batch first, `[b, s, h]`. Attention matrices are whole. Nothing casts: a model in fp64 computes everything in
fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.reference.plain_config import LatentConfig, PlainConfig
from tests.reference.plain_moe import MoE, RouterRecord


def activate(x: Tensor, name: str) -> Tensor:
    """silu x * sigmoid(x); gelu with the exact erf; squared_relu max(x, 0)^2."""
    match name:
        case "silu":
            return x * torch.sigmoid(x)
        case "gelu":
            return x * 0.5 * (1 + torch.erf(x / 2**0.5))
        case "relu":
            return x.clamp(min=0)
        case "squared_relu":
            return x.clamp(min=0) ** 2
    raise ValueError(name)


class Norm(nn.Module):
    """RMSNorm: g * x / sqrt(mean(x^2) + eps). LayerNorm: the same of x - mean(x), plus a bias.

    g is the weight, or 1 + weight.
    """

    def __init__(self, cfg: PlainConfig, size: int):
        super().__init__()
        self.eps, self.offset = cfg.eps, float(cfg.zero_centered_gamma)
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if cfg.normalization == "LayerNorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            x = x - x.mean(-1, keepdim=True)
        x = (self.weight + self.offset) * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)
        return x if self.bias is None else x + self.bias


def rotate(x: Tensor, positions: Tensor, cfg: PlainConfig, pairs: str) -> Tensor:
    """RoPE (arXiv 2104.09864, equation 34): the pair j of a head at position m is turned by the angle m * base^(-2j /
    width).

    Args:
        x: [b, s, heads, d]; only the first `rope_percent` of d is turned, the rest passes.
        positions: [b, s].
        pairs: which coordinates form the pair j: "halves" (j, j + width/2), or "neighbours" (2j, 2j + 1) as in MLA,
            whose result is laid out in halves. Queries and keys share the layout, so it does not show in their
            products.
    """
    if cfg.rope_base is None:
        return x
    width = int(x.shape[-1] * cfg.rope_percent)
    x, rest = x[..., :width], x[..., width:]
    frequency = cfg.rope_base ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    angle = positions.to(x.dtype)[:, :, None, None] * frequency
    first, second = (x[..., 0::2], x[..., 1::2]) if pairs == "neighbours" else x.chunk(2, dim=-1)
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat((*turned, rest), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head.

    Args:
        q, k, v: [b, s, heads, d] (v may have its own d).
        allowed: [b, s, s] bool, allowed[., i, j]: slot i may look at slot j.
    Returns:
        [b, s, heads * d_v].
    """
    scores = torch.einsum("bind,bjnd->bnij", q, k) / q.shape[-1] ** 0.5
    probabilities = torch.softmax(scores.masked_fill(~allowed[:, None], float("-inf")), dim=-1)
    return torch.einsum("bnij,bjnd->bind", probabilities, v).flatten(2)


class Attention(nn.Module):
    """Grouped-query attention: query head n reads key/value head n // (heads / groups)."""

    def __init__(self, cfg: PlainConfig):
        super().__init__()
        h, d, qkv_bias = cfg.hidden_size, cfg.width_of_head, cfg.bias or cfg.qkv_bias
        self.cfg = cfg
        self.q = nn.Linear(h, cfg.num_heads * d, bias=qkv_bias)
        self.k = nn.Linear(h, cfg.groups * d, bias=qkv_bias)
        self.v = nn.Linear(h, cfg.groups * d, bias=qkv_bias)
        self.o = nn.Linear(cfg.num_heads * d, h, bias=cfg.bias)
        self.q_norm = Norm(cfg, d) if cfg.qk_norm else None
        self.k_norm = Norm(cfg, d) if cfg.qk_norm else None

    def forward(self, x: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        cfg, d = self.cfg, self.cfg.width_of_head
        q, k, v = (linear(x).unflatten(-1, (-1, d)) for linear in (self.q, self.k, self.v))
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, positions, cfg, "halves"), rotate(k, positions, cfg, "halves")
        heads_per_group = cfg.num_heads // cfg.groups
        k, v = k.repeat_interleave(heads_per_group, dim=2), v.repeat_interleave(heads_per_group, dim=2)
        return self.o(attend(q, k, v, allowed))


class LatentAttention(nn.Module):
    """MLA: queries, keys and values come from low-rank latents; one rotated key part is shared by all heads."""

    def __init__(self, cfg: PlainConfig, latent: LatentConfig):
        super().__init__()
        h, n = cfg.hidden_size, cfg.num_heads
        q_width = n * (latent.qk_head_dim + latent.qk_pos_emb_head_dim)
        self.cfg, self.latent = cfg, latent
        if latent.q_lora_rank is None:
            self.q = nn.Linear(h, q_width, bias=False)
        else:
            self.q_down = nn.Linear(h, latent.q_lora_rank, bias=False)
            self.q_up = nn.Linear(latent.q_lora_rank, q_width, bias=False)
        self.kv_down = nn.Linear(h, latent.kv_lora_rank + latent.qk_pos_emb_head_dim, bias=False)
        self.kv_up = nn.Linear(latent.kv_lora_rank, n * (latent.qk_head_dim + latent.v_head_dim), bias=False)
        self.o = nn.Linear(n * latent.v_head_dim, h, bias=cfg.bias)
        norm_q = latent.latent_norms and latent.q_lora_rank is not None
        self.q_norm = Norm(cfg, latent.q_lora_rank) if norm_q else None
        self.kv_norm = Norm(cfg, latent.kv_lora_rank) if latent.latent_norms else None

    def queries(self, x: Tensor) -> Tensor:
        if self.latent.q_lora_rank is None:
            return self.q(x)
        c = self.q_down(x)
        return self.q_up(c if self.q_norm is None else self.q_norm(c))

    def forward(self, x: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        cfg, latent, n = self.cfg, self.latent, self.cfg.num_heads
        q = self.queries(x).unflatten(-1, (n, -1))
        c, k_shared = self.kv_down(x).split((latent.kv_lora_rank, latent.qk_pos_emb_head_dim), dim=-1)
        kv = self.kv_up(c if self.kv_norm is None else self.kv_norm(c)).unflatten(-1, (n, -1))
        k, v = kv.split((latent.qk_head_dim, latent.v_head_dim), dim=-1)
        q_turned = rotate(q[..., latent.qk_head_dim :], positions, cfg, "neighbours")
        k_turned = rotate(k_shared[:, :, None], positions, cfg, "neighbours").expand(-1, -1, n, -1)
        q = torch.cat((q[..., : latent.qk_head_dim], q_turned), dim=-1)
        return self.o(attend(q, torch.cat((k, k_turned), dim=-1), v, allowed))


class MLP(nn.Module):
    """down(f(gate(x)) * up(x)), or down(f(up(x))) without a gate."""

    def __init__(self, cfg: PlainConfig, width: int, bias: bool):
        super().__init__()
        self.activation = cfg.activation
        self.gate = nn.Linear(cfg.hidden_size, width, bias=bias) if cfg.gated else None
        self.up = nn.Linear(cfg.hidden_size, width, bias=bias)
        self.down = nn.Linear(width, cfg.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(activate(self.up(x), self.activation))
        return self.down(activate(self.gate(x), self.activation) * self.up(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, cfg: PlainConfig, is_moe: bool):
        super().__init__()
        self.attention_norm = Norm(cfg, cfg.hidden_size)
        self.attention = Attention(cfg) if cfg.latent is None else LatentAttention(cfg, cfg.latent)
        self.mlp_norm = Norm(cfg, cfg.hidden_size)
        self.is_moe = is_moe
        self.mlp = (
            MoE(cfg.moe, cfg.hidden_size, cfg.bias, lambda width, bias: MLP(cfg, width, bias))
            if is_moe
            else MLP(cfg, cfg.ffn_size, cfg.bias)
        )

    def forward(self, x: Tensor, positions: Tensor, allowed: Tensor, routers: list[RouterRecord]) -> Tensor:
        """[b, s, h] -> [b, s, h]; a MoE block appends what its router did to `routers`."""
        x = x + self.attention(self.attention_norm(x), positions, allowed)
        y = self.mlp_norm(x)
        if not self.is_moe:
            return x + self.mlp(y)
        output, record = self.mlp(y)
        routers.append(record)
        return x + output
