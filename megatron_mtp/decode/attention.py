"""Self-attention over static caches: grouped queries, and multi-latent attention on the latent itself.

Both end in one call of scaled_dot_product_attention in which the query heads of a key/value group are rows of one head,
so no key or value is repeated and no kernel needs to support groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mtp.decode.linear import Linear
from megatron_mtp.decode.norm import Norm
from megatron_mtp.decode.rope import rotate
from megatron_mtp.decode.span import Span
from megatron_mtp.decode.tensor_parallel import TensorParallel

# Passes with more tokens keep their heads separate, as in training; in shorter ones the heads of a group are rows.
LONG = 32


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of one layer in static slots. MLA keeps one tensor that is both.

    keys: [b, groups/tp, slots, key width], values: [b, groups/tp, slots, value width].
    """

    keys: Tensor
    values: Tensor

    def keep(self, start: int, slots: list[int]) -> None:
        """Moves the given slots to `start`, `start + 1`, ...: the accepted path of a draft tree."""
        index = torch.tensor(slots, device=self.keys.device)
        for tensor in {id(t): t for t in (self.keys, self.values)}.values():
            tensor[:, :, start : start + len(slots)] = tensor[:, :, index]


def attend(query: Tensor, cache: Cache, span: Span, heads: int, scale: float) -> Tensor:
    """query: [b * q, heads, width] -> [b * q, heads, value width], over the slots of `cache` visible in `span`."""
    keys, values = cache.keys[:, :, : span.stop], cache.values[:, :, : span.stop]
    if span.q > LONG:
        return _attend_long(query, keys, values, span, scale)
    groups = keys.shape[1]
    each = heads // groups
    b, q = span.b, span.q
    if q == 1:
        rows = query.reshape(b, groups, each, -1)
    else:
        rows = query.view(b, q, groups, each, -1).transpose(1, 2).reshape(b, groups, q * each, -1)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=span.mask(each), scale=scale)
    if q == 1:
        return out.reshape(b, heads, -1)
    return out.view(b, groups, q, each, -1).transpose(1, 2).reshape(b * q, heads, -1)


def _attend_long(query: Tensor, keys: Tensor, values: Tensor, span: Span, scale: float) -> Tensor:
    """For prompts: a mask per head of a group would be big, and a causal kernel needs none."""
    heads = query.shape[1]
    query = query.view(span.b, span.q, heads, -1).transpose(1, 2)
    is_causal = span.start == 0
    out = F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=None if is_causal else span.mask(1),
        is_causal=is_causal,
        scale=scale,
        enable_gqa=keys.shape[1] < heads,
    )
    return out.transpose(1, 2).reshape(span.b * span.q, heads, -1)


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """Grouped-query attention of this rank's heads.

    Args:
        qkv: h -> [all query heads; all key heads; all value heads], coordinates of a RoPE pair adjacent.
        out: heads/tp * width -> h.
        head_norm: norm of queries and keys [n, heads + groups, width] per head, or None.
    """

    qkv: Linear
    out: Linear
    heads: int
    groups: int
    width: int
    head_norm: Norm | None
    tp: TensorParallel

    def __call__(self, x: Tensor, residual: Tensor, span: Span, cache: Cache) -> Tensor:
        """x: [b * q, h], normed. Returns residual + attention, [b * q, h]."""
        heads, both = self.heads, self.heads + self.groups
        qkv = self.qkv(x).view(-1, both + self.groups, self.width)
        rotated = qkv[:, :both]
        if self.head_norm is not None:
            rotated = self.head_norm(rotated.contiguous())
        if span.rotation is not None:
            rotated = rotate(rotated, span.rotation)
        span.write(cache.keys, rotated[:, heads:])
        span.write(cache.values, qkv[:, both:])
        context = attend(rotated[:, :heads], cache, span, heads, self.width**-0.5).view(-1, heads * self.width)
        return join(self.out, context, residual, self.tp)

    def new_cache(self, b: int, slots: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """Empty slots."""
        keys, values = (torch.zeros(b, self.groups, slots, self.width, dtype=dtype, device=device) for _ in range(2))
        return Cache(keys, values)

    @property
    def values_of_slot(self) -> int:
        return 2 * self.groups * self.width


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """MLA with its up projections absorbed: attention runs on the latents, and the heads' values are made afterwards.

    A slot stores kv_lora_rank + rope numbers for all heads together. Multiplying queries with `key_up` before and
    contexts with `value_up` after the attention equals attention over per-head keys and values, up to rounding. Both
    include the weight of the latent's norm.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.

    Args:
        down: h -> [query latent (or this rank's query heads); key/value latent; rope key].
        query_up: query latent -> this rank's query heads; None: `down` returns them.
        key_up: [heads/tp, qk_head_dim, kv_lora_rank].
        value_up: [heads/tp, kv_lora_rank, v_head_dim].
        out: heads/tp * v_head_dim -> h.
        splits: widths of the parts of `down`.
    """

    down: Linear
    query_norm: Norm | None
    query_up: Linear | None
    latent_norm: Norm | None
    key_up: Tensor
    value_up: Tensor
    out: Linear
    heads: int
    splits: tuple[int, int, int]
    scale: float
    tp: TensorParallel

    def __call__(self, x: Tensor, residual: Tensor, span: Span, cache: Cache) -> Tensor:
        """x: [b * q, h], normed. Returns residual + attention, [b * q, h]."""
        query, latent, rope_key = self.down(x).split(self.splits, dim=-1)
        if self.query_up is not None:
            query = query.contiguous()
            query = self.query_up(query if self.query_norm is None else self.query_norm(query))
        if self.latent_norm is not None:
            latent = self.latent_norm(latent.contiguous())
        query = query.view(x.shape[0], self.heads, -1)
        plain = query[..., : self.key_up.shape[1]].transpose(0, 1)  # [heads, n, qk_head_dim]
        absorbed = torch.bmm(plain, self.key_up).transpose(0, 1)  # [n, heads, kv_lora_rank]
        rotated, rope_key = query[..., self.key_up.shape[1] :], rope_key[:, None]
        if span.rotation is not None:
            rotated = rotate(rotated, span.rotation)
            rope_key = rotate(rope_key, span.rotation)
        span.write(cache.keys, torch.cat((latent[:, None], rope_key), dim=-1))
        # Fast kernels need keys and values of one width: the mean of the rope keys is computed and dropped.
        context = attend(torch.cat((absorbed, rotated), dim=-1), cache, span, self.heads, self.scale)
        context = torch.bmm(context[..., : latent.shape[-1]].transpose(0, 1), self.value_up)  # [heads, n, v_head_dim]
        return join(self.out, context.transpose(0, 1).reshape(x.shape[0], -1), residual, self.tp)

    def new_cache(self, b: int, slots: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """Empty slots."""
        latent = torch.zeros(b, 1, slots, self.values_of_slot, dtype=dtype, device=device)
        return Cache(latent, latent)

    @property
    def values_of_slot(self) -> int:
        return self.splits[1] + self.splits[2]


def join(out: Linear, x: Tensor, residual: Tensor, tp: TensorParallel) -> Tensor:
    """residual + the sum over ranks of out(x)."""
    return out.plus(x, residual) if tp.size == 1 else residual + tp.reduce(out(x))
