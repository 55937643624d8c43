"""From the hidden states of all depths to the sums that make the loss. Nothing is divided here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mtp.config.filled import filled
from megatron_mtp.data.batch import MicroBatch
from megatron_mtp.objective.cross_entropy import TokenLosses, VocabShard, chunked_cross_entropy
from megatron_mtp.parallel.resolve import ResolvedRun


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What the heads find in one micro-batch on this rank. Row k of the depths' axis is depth k, 0 the main prediction.

    A dataclass rather than a tuple: Megatron-Core's Float16Module converts the elements of tuples.
    """

    total: Tensor  # [] fp32, what the coefficients make of all depths' losses; its gradient exists already
    sums: Tensor  # [1+D] fp32 over the valid targets: cross entropies in nats
    top1: Tensor  # [1+D, b, s/cp] int64, the most probable id


@dataclass(frozen=True, slots=True)
class DepthHeads:
    """The output heads of all depths: one weight, one cross entropy over vocabulary shards.

    Args:
        vocab_size: weight rows from this id on are padding.
        tp_group: tensor-parallel group.
        sequence_parallel: hidden states are sharded along the sequence over tp_group.
        detach_depths: depths 1..D do not train the head (mtp_detach_heads).
        chunk_tokens: tokens in one chunk of logits.
        z_loss_coeff: coefficient of log(Z)^2 (logits_z_loss_coeff).
        frozen_trunk: the main prediction trains nothing (mtp_freeze_trunk), so its logits need no backward pass.
    """

    vocab_size: int
    tp_group: ProcessGroup
    sequence_parallel: bool
    detach_depths: bool
    chunk_tokens: int
    z_loss_coeff: float
    frozen_trunk: bool

    @classmethod
    def of(cls, run: ResolvedRun, tp_group: ProcessGroup) -> DepthHeads:
        """The heads of a resolved run."""
        model = run.cfg.model
        return cls(
            vocab_size=filled(model.vocab_size),
            tp_group=tp_group,
            sequence_parallel=model.sequence_parallel,
            detach_depths=model.mtp_detach_heads,
            chunk_tokens=run.logits_chunk_tokens,
            z_loss_coeff=model.logits_z_loss_coeff,
            frozen_trunk=model.mtp_freeze_trunk,
        )

    def __call__(
        self,
        states: Tensor,
        weight: Tensor,
        batch: MicroBatch,
        coefficients: Tensor,
        gradient_scale: Tensor | float = 1.0,
    ) -> HeadOutput:
        """The total of a micro-batch, sums over its valid targets, and every slot's top-1 id.

        Args:
            states: [1+D, s/cp, b, h] after each depth's final norm; [1+D, s/(cp*tp), b, h] under sequence parallelism.
            weight: [v_padded/tp, h].
            batch: gives labels and loss mask, [1+D, b, s/cp].
            coefficients: [1+D] fp32, what the total multiplies each depth's sum by.
            gradient_scale: the gradient that the total will receive, see `chunked_cross_entropy`.
        """
        token_weights = batch.loss_mask * coefficients[:, None, None]  # [1+D, b, s/cp]
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
                    token_weights[part],
                    gradient_scale,
                )
            )
        totals, losses, top1 = zip(*parts, strict=True)
        sums = (torch.cat(losses) * batch.loss_mask).sum(dim=(1, 2), dtype=torch.float32)
        return HeadOutput(torch.stack(totals).sum(), sums, torch.cat(top1))

    def _cross_entropy(
        self, states: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, gradient_scale: Tensor | float
    ) -> TokenLosses:
        """Losses and top-1 ids as [d, b, s/cp]."""
        hidden = states.transpose(1, 2)  # [d, s, b, h] -> [d, b, s, h]
        total, loss, top1 = chunked_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            labels.reshape(-1),
            token_weights.reshape(-1),
            VocabShard.of(weight, self.vocab_size, self.tp_group),
            self.chunk_tokens,
            self.z_loss_coeff,
            gradient_scale,
        )
        return TokenLosses(total, loss.view(labels.shape), top1.view(labels.shape))

    def _join(self, states: Tensor) -> Tensor:
        """Gives every tensor-parallel rank all tokens; in the backward pass the shards' gradients are summed."""
        if self.tp_group.size() == 1:
            return states
        if not self.sequence_parallel:
            copied: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(states, group=self.tp_group)
            return copied
        by_sequence = states.transpose(0, 1).contiguous()  # [s/tp, 1+D, b, h]
        gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(
            by_sequence, tensor_parallel_output_grad=True, group=self.tp_group
        )
        return gathered.transpose(0, 1)
