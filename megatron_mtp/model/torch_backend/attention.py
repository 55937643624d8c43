"""Core attention on torch's scaled_dot_product_attention: causal, grouped queries, documents, context parallel.

Megatron-Core's own `DotProductAttention` materialises every score, refuses context parallelism and packing, and has no
`k_channels`/`v_channels`, which multi-latent attention passes.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_mtp.errors import UnsupportedError

# Masked attention runs over this many queries at a time, so that the mask's memory does not grow with s^2 and few keys
# beyond the diagonal are computed. On a CPU 256 was fastest (s 1024 and 4096, one thread: 64 to 512 tried); a GPU wants
# fewer and larger calls.
TILE_ROWS = {"cpu": 256, "cuda": 2048}


class TorchCoreAttention(MegatronModule):
    """softmax(q k^T * scale) v, where a query sees the keys at or before it, of its own document if there are several.

    Args:
        config: of the layer. Sliding windows and attention sinks are refused.
        layer_number: counted from 1; unused, part of Megatron-Core's interface.
        attn_mask_type: causal only.
        attention_type: "self"; unused.
        attention_dropout: probability; None: config.attention_dropout.
        softmax_scale: None: 1 / sqrt(width of a query head).
        k_channels: width of a query and key head; None: config.kv_channels.
        v_channels: width of a value head; None: k_channels.
        cp_comm_type: unused; keys and values are all-gathered.
        pg_collection: its `cp` group shards the sequence.

    Raises:
        UnsupportedError: the config asks for an attention that is not built here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        _refuse_unsupported(config, attn_mask_type)
        assert pg_collection is not None, "core attention needs the process groups of its model"
        self.cp_group = pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # apply_query_key_layer_scaling divides here and multiplies again inside the softmax: nothing is left of it.
        self.scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attention of this rank's queries.

        Args:
            query: [s/cp, b, heads/tp, k_channels], zigzag-sharded over the cp group (chunks r and 2*cp-1-r of 2*cp).
            key: [s/cp, b, groups/tp, k_channels], sharded alike.
            value: [s/cp, b, groups/tp, v_channels], sharded alike.
            attention_mask: None, or segment ids [b, s], int, of the full sequence: a query sees the keys with its id.
            attn_mask_type: causal; part of Megatron-Core's interface.
            attention_bias: None.
            packed_seq_params: None.

        Returns:
            [s/cp, b, heads/tp * v_channels].

        Raises:
            UnsupportedError: packed sequences or a bias were passed.
        """
        if packed_seq_params is not None:
            raise UnsupportedError(
                "packed_seq_params is set: the torch backend takes documents as segment ids [b, s] in attention_mask. "
                "Set dataset.reset_attention_mask, or model.backend = transformer_engine."
            )
        if attention_bias is not None:
            raise UnsupportedError("attention_bias is set: the torch backend has no attention bias.")
        # [s/cp, b, heads, width] -> [b, heads, s/cp, width]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with self._dropout_rng():
            if self.cp_group.size() == 1:
                context = self._attend(query, key, value, 0, attention_mask)
            else:
                context = self._attend_zigzag(query, key, value, attention_mask)
        return context.permute(2, 0, 1, 3).flatten(2)  # -> [s/cp, b, heads * v_channels]

    def _dropout_rng(self) -> contextlib.AbstractContextManager[Any]:
        # Heads are sharded over TP, so each rank needs its own random numbers. Under sequence parallelism the full
        # block runs in this fork already.
        if self.dropout == 0.0 or not self.training or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()

    def _attend_zigzag(self, query: Tensor, key: Tensor, value: Tensor, segment_ids: Tensor | None) -> Tensor:
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = gather_zigzag(key, value, self.cp_group)
        chunk = query.shape[2] // 2
        early, late = query.split(chunk, dim=2)
        starts = (rank * chunk, (2 * cp - 1 - rank) * chunk)
        return torch.cat(
            [self._attend(q, key, value, start, segment_ids) for q, start in zip((early, late), starts, strict=True)],
            dim=2,
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, start: int, segment_ids: Tensor | None) -> Tensor:
        """Queries of the positions start .. start + rows over the keys from position 0."""
        rows = query.shape[2]
        key, value = key[:, :, : start + rows], value[:, :, : start + rows]
        if segment_ids is None and start == 0:
            return self._sdpa(query, key, value, is_causal=True)
        if segment_ids is None and query.is_cuda:
            return self._sdpa(query, key, value, mask=causal_lower_right(rows, start + rows))
        tile = TILE_ROWS.get(query.device.type, rows)
        return torch.cat(
            [
                self._attend_masked(query[:, :, lo : lo + tile], key, value, start + lo, segment_ids)
                for lo in range(0, rows, tile)
            ],
            dim=2,
        )

    def _attend_masked(
        self, query: Tensor, key: Tensor, value: Tensor, start: int, segment_ids: Tensor | None
    ) -> Tensor:
        stop = start + query.shape[2]
        mask = visible_keys(start, stop, segment_ids, query.device)
        first = 0
        if segment_ids is not None and query.device.type == "cpu":
            # Documents before the first one that these queries belong to need no work. A GPU would have to wait for
            # the result.
            first = int(mask.flatten(0, -2).any(dim=0).to(torch.uint8).argmax())
        return self._sdpa(query, key[:, :, first:stop], value[:, :, first:stop], mask=mask[..., first:])

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, is_causal: bool = False) -> Tensor:
        heads, groups, width, v_width = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        if query.device.type == "cpu" or (mask is None and query.dtype != torch.float32):
            # The flash kernels know groups, and want one width for keys and values.
            value = F.pad(value, (0, width - v_width)) if v_width < width else value
        elif groups < heads:
            # What is left on a GPU is the memory-efficient kernel, which knows widths but no groups; scores would be
            # materialised.
            key, value = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=key.shape[1] < heads,
        )
        return context[..., :v_width]


def visible_keys(start: int, stop: int, segment_ids: Tensor | None, device: torch.device) -> Tensor:
    """Which of the keys 0 .. stop the queries start .. stop see.

    With segment ids [[0, 0, 1, 1]], start 1 and stop 4: rows 1100, 0010, 0011.

    Args:
        start: position of the first query.
        stop: position after the last query.
        segment_ids: [b, s] of the full sequence, or None for one document.

    Returns:
        Booleans [stop - start, stop], or [b, 1, stop - start, stop] with segments; True where a key is seen.
    """
    causal = torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril(start)
    if segment_ids is None:
        return causal
    same = segment_ids[:, start:stop, None] == segment_ids[:, None, :stop]
    return (same & causal)[:, None]


def gather_zigzag(key: Tensor, value: Tensor, group: torch.distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """All-gathers keys and values over the cp group, in order of position. The backward pass reduce-scatters.

    Args:
        key: [b, groups, s/cp, k_channels], chunks r and 2*cp-1-r.
        value: [b, groups, s/cp, v_channels], sharded alike.

    Returns:
        key [b, groups, s, k_channels] and value [b, groups, s, v_channels], the same on all cp ranks.
    """
    cp = group.size()
    both = torch.cat([key, value], dim=-1).permute(2, 0, 1, 3).contiguous()  # one message in place of two
    gathered = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=group)
    # [cp * 2 * chunk, ...] -> chunks 0 .. cp-1 are the first halves, 2*cp-1 .. cp the second ones
    halves = gathered.unflatten(0, (cp, 2, -1))
    ordered = torch.cat([halves[:, 0], halves[:, 1].flip(0)]).flatten(0, 1)  # [s, b, groups, k + v]
    key_all, value_all = ordered.permute(1, 2, 0, 3).split([key.shape[-1], value.shape[-1]], dim=-1)
    return key_all, value_all


def _refuse_unsupported(config: TransformerConfig, attn_mask_type: AttnMaskType) -> None:
    problems = []
    if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
        problems.append(f"attention mask {attn_mask_type.name}: the torch backend attends causally only.")
    if config.window_size is not None:
        problems.append(f"window_size = {config.window_size}: the torch backend has no sliding window. Leave it unset.")
    if config.softmax_type != "vanilla":
        problems.append(f"softmax_type = {config.softmax_type}: the torch backend has vanilla softmax only.")
    if config.qk_clip:
        problems.append("qk_clip = True: the torch backend does not record the largest logits. Leave it off.")
    if problems:
        raise UnsupportedError(problems)
