"""One micro-batch through one model chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_mtp.data.batch import MicroBatch
from megatron_mtp.objective.acceptance import acceptance_counts
from megatron_mtp.objective.heads import DepthBatch, DepthHeads
from megatron_mtp.objective.total import StepObjective

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(slots=True)
class StepContext:
    """What one step's micro-batches share.

    Args:
        heads: the output processor of the last stage.
        objective: of this step, with the global counts.
        device: where the model is.
        cp_group: context-parallel group.
        acceptance: [rows, 1+D] int64 sums so far on this rank; None until the first micro-batch of the last stage.
    """

    heads: DepthHeads
    objective: StepObjective
    device: torch.device
    cp_group: ProcessGroup
    acceptance: Tensor | None = field(default=None)


def forward_step(
    context: StepContext, data_iterator: Iterator[MicroBatch], model: nn.Module
) -> tuple[Tensor, LossFunction]:
    """Reads one micro-batch and runs the chunk on it.

    Args:
        context: of this step.
        data_iterator: micro-batches of this rank, in order; each chunk has an iterator of its own.
        model: one chunk.

    Returns:
        The chunk's output (hidden states, or on the last stage [2, 1+D] sums) and the loss function that Megatron-Core's
        schedule calls with it on the last stage.
    """
    batch = next(data_iterator).to(context.device)
    depths = DepthBatch(shifted_ids=batch.shifted_ids, labels=batch.labels, loss_mask=batch.loss_mask)
    output = model(
        input_ids=batch.tokens,
        position_ids=batch.position_ids,
        attention_mask=batch.segment_ids,
        output_processor=context.heads,
        output_processor_context=depths,
    )
    return output, partial(_loss, context, depths)


def _loss(context: StepContext, depths: DepthBatch, sums: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    counts = acceptance_counts(depths.top1, depths.labels, depths.loss_mask, context.cp_group)
    context.acceptance = counts if context.acceptance is None else context.acceptance + counts
    return context.objective.loss_function(sums)
