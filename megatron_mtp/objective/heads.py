"""From the hidden states of all depths to the sums the loss is made of. Nothing here divides."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mtp.objective.cross_entropy import VocabShard, chunked_cross_entropy


@dataclass(slots=True)
class DepthBatch:
    """One micro-batch as the heads and the MTP layers read it, and what the heads found out about it.

    Row k of the first axis is depth k; depth 0 is the main prediction.
    """

    shifted_ids: Tensor  # [D, b, s/cp] int64: entry k-1 holds t[i+k] at slot i
    labels: Tensor  # [1+D, b, s/cp] int64: t[i+k+1]
    loss_mask: Tensor  # [1+D, b, s/cp] fp32, 1 where the target is valid
    top1: Tensor | None = field(default=None)  # [1+D, b, s/cp] int64, written by the heads


@dataclass(frozen=True, slots=True)
class DepthHeads:
    """Callable that MTPModel is given as its output processor.

    Args:
        vocab_size: ids of this and above are padding rows of the weight.
        tp_group: tensor-parallel group.
        sequence_parallel: hidden states are sharded along the sequence over tp_group.
        detach_depths: depths 1..D do not train the head (mtp_detach_heads).
        frozen_trunk: nothing trains by the main prediction (mtp_freeze_trunk), so its logits need no backward pass.
        chunk_tokens: tokens of one chunk of logits; None: by device.
    """

    vocab_size: int
    tp_group: ProcessGroup
    sequence_parallel: bool
    detach_depths: bool
    chunk_tokens: int | None
    frozen_trunk: bool = False

    def __call__(self, states: Tensor, weight: Tensor, batch: DepthBatch) -> Tensor:
        """Sums over the valid targets of this micro-batch on this rank.

        Args:
            states: [1+D, s, b, h] after each depth's final norm, s = s/cp, divided by tp too under sequence parallelism.
            weight: [v_padded/tp, h].
            batch: of this micro-batch; its `top1` is written.

        Returns:
            [2, 1+D] fp32: sums of cross entropies [nats] and of squared log-sum-exps.
        """
        states = self._join(states)  # [1+D, s/cp, b, h]
        is_apart = (self.detach_depths or self.frozen_trunk) and states.shape[0] > 1
        parts = []
        for part in [slice(0, 1), slice(1, None)] if is_apart else [slice(None)]:
            is_main = is_apart and part.start == 0
            parts.append(
                self._cross_entropy(
                    states[part].detach() if is_main and self.frozen_trunk else states[part],
                    weight.detach() if part.start and self.detach_depths else weight,
                    batch.labels[part],
                )
            )
        loss, lse, top1 = (torch.cat(column) for column in zip(*parts, strict=True))  # [1+D, b, s/cp]
        batch.top1 = top1
        sums = torch.stack((loss, lse.square())) * batch.loss_mask
        return sums.sum(dim=(2, 3), dtype=torch.float32)

    def _cross_entropy(self, states: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = states.transpose(1, 2)  # [d, s, b, h] -> [d, b, s, h]
        flat = hidden.reshape(-1, hidden.shape[-1])
        shard = VocabShard.of(weight, self.vocab_size, self.tp_group)
        results = chunked_cross_entropy(flat, weight, labels.reshape(-1), shard, self.chunk_tokens)
        return tuple(result.view(labels.shape) for result in results)  # type: ignore[return-value]

    def _join(self, states: Tensor) -> Tensor:
        """Gives every tensor-parallel rank all tokens; in the backward pass the shards' gradients are summed."""
        if self.tp_group.size() == 1:
            return states
        if not self.sequence_parallel:
            return tensor_parallel.copy_to_tensor_model_parallel_region(states, group=self.tp_group)
        by_sequence = states.transpose(0, 1).contiguous()  # [s/tp, 1+D, b, h]
        whole = tensor_parallel.gather_from_sequence_parallel_region(
            by_sequence, tensor_parallel_output_grad=True, group=self.tp_group
        )
        return whole.transpose(0, 1)
