"""One micro-batch through one model chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn

from megatron_mtp.data.batch import MicroBatch
from megatron_mtp.objective.heads import HeadOutput
from megatron_mtp.objective.objective import StepObjective

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""The micro-batch's total -> (loss, number of tokens, results). The results are those that `objective.RESULTS` names.
Others would be logged nowhere, so they end the run with a ForwardStepError: log them from a callback."""
ForwardStep = Callable[[StepObjective, Iterator[MicroBatch], nn.Module], tuple[Tensor, LossFunction | None]]
"""Runs one micro-batch through one model chunk; see `forward_step`. One of your own usually calls `forward_step` and
changes its results, or calls the model and then `context.loss_function`."""


def forward_step(
    context: StepObjective, data_iterator: Iterator[MicroBatch], model: nn.Module
) -> tuple[Tensor, LossFunction | None]:
    """Reads one micro-batch and runs the model chunk on it.

    Args:
        context: the objective of this step.
        data_iterator: micro-batches of this rank, in order; each model chunk has its own iterator.
        model: one model chunk.

    Returns:
        On the last stage the micro-batch's total and the loss function that Megatron-Core's schedule calls with it;
        before it hidden states and None.
    """
    batch = next(data_iterator).to(context.device)
    output = model(
        input_ids=batch.tokens,
        position_ids=batch.position_ids,
        attention_mask=batch.segment_ids,  # not a mask: document ids [b, s], read by model/torch_backend/attention.py
        output_processor=context.heads,
        output_processor_context=batch,
    )
    if isinstance(output, HeadOutput):
        return output.total, partial(context.loss_function, batch, output)
    return output, None
