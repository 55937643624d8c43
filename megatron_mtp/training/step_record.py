"""The record of one step: what the trainer and its parts know of it, put together for the recorder."""

from __future__ import annotations

from megatron_mtp.config.depths import loss_names
from megatron_mtp.observe.metrics import StepRecord, columns, scalars
from megatron_mtp.training.run_facts import peak_memory_by_stage
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState
from megatron_mtp.training.step import StepResult
from megatron_mtp.training.throughput import Rates


def step_record(
    run: Run,
    state: TrainState,
    result: StepResult,
    *,
    batch_size: int,
    learning_rate: float,
    loss_factor: float,
    elapsed_s: float,
    rates: Rates,
    extra: dict[str, float],
) -> StepRecord:
    """The record of a step that `state` counts already.

    Args:
        batch_size: samples of the global batch.
        loss_factor: lambda.
        extra: other metrics of the step, by name.
    """
    num_depths = run.engine.objective.num_depths
    extra = result.acceptance_rates() | run.engine.gradients.times_ms() | extra
    if result.update_s is not None:
        extra["perf/update_ms"] = result.update_s * 1e3
    for name, count in zip(loss_names(num_depths), result.depth_counts.tolist(), strict=True):
        extra[f"{name.removesuffix(' loss')}/num_targets"] = count
    if num_depths:
        extra["mtp/loss_scaling_factor"] = loss_factor
    extra |= {f"mtp_{k}/accepted_over_run": share for k, share in enumerate(state.accepted_over_run(), 1)}
    if state.iteration % run.cfg.logger.log_interval == 0:
        extra |= peak_memory_by_stage(run)
    return StepRecord(
        iteration=state.iteration,
        train_iters=run.cfg.train.train_iters,
        consumed_samples=state.consumed_samples,
        consumed_tokens=state.consumed_tokens,
        elapsed_ms=elapsed_s * 1e3,
        learning_rate=learning_rate,
        global_batch_size=batch_size,
        losses=result.named_losses(),
        loss_scale=float(run.engine.optimizer.get_loss_scale()),
        grad_norm=result.grad_norm,
        num_zeros=result.num_zeros,
        skipped=int(not result.updated),
        nan=int(result.has_nan),
        extra=extra,
        **rates,
    )


def built_in_names(record: StepRecord) -> set[str]:
    """Names of all built-in metrics of a step, with those that this step does not have."""
    return {column.name for column in columns(record)} | scalars(record).keys()
