"""Measures one layout, on every worker of a pool.

Measured are losses, counts, routing, every gradient, the initial weights and a short curve.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from megatron_mtp.config import ConfigContainer
from megatron_mtp.device.process_group import job_size
from megatron_mtp.model.sharded import gather_parts, gradient_parts, parameter_parts, unwrap, whole_tensors
from megatron_mtp.objective.metrics import BatchMetrics
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.training.setup import Run, setup
from megatron_mtp.verify.batches import BatchSpec, seeded_samples
from megatron_mtp.verify.routing import RouterCall, RoutingRecorder, gather_routing


@dataclass(slots=True)
class Measurement:
    """What one layout computes. Tensors are complete, on the CPU, under the names of the sharded state dict.

    Attributes:
        sums, losses, counts: [1+D], of one forward and backward pass.
        acceptance: rows of objective.acceptance.ROWS.
        router: mean of each router loss.
        gradients: name -> gradient of the total.
        gradient_spread: name -> largest difference between two ranks' copies of the same part.
        routing: router call -> [B, s, E] bool.
        weights: name -> initial weight; weight_spread as gradient_spread.
        curve: losses [1+D] of each optimizer step, from the initial weights on.
        routing_curve: routing of each of these steps.
        seconds: wall-clock time.
    """

    sums: list[float]
    losses: list[float]
    counts: list[int]
    acceptance: list[list[int]]
    router: dict[str, float]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    gradient_spread: dict[str, float] = field(default_factory=dict)
    routing: dict[RouterCall, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    weight_spread: dict[str, float] = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)
    routing_curve: list[dict[RouterCall, Tensor]] = field(default_factory=list)
    seconds: float = 0.0


def measure(cfg: ConfigContainer, spec: BatchSpec, curve_steps: int = 0) -> Measurement | None:
    """Sets the run up in the group that this process is in, measures, and takes it down again.

    Args:
        cfg: finalized for the size of the group; train.global_batch_size is spec.num_samples.
        spec: of the global batches. Step n of the curve reads batch n; gradients are those of batch 0.
        curve_steps: optimizer steps at the constant rate optimizer.lr.

    Returns:
        The measurement on rank 0, None elsewhere.
    """
    began = time.monotonic()
    run = setup(resolve(cfg, job_size()))
    try:
        found = _measure(run, spec, curve_steps)
    finally:
        run.release()
        del run
        gc.collect()  # modules and hooks refer to each other in circles
    if found is not None:
        found.seconds = time.monotonic() - began
    return found


def _measure(run: Run, spec: BatchSpec, curve_steps: int) -> Measurement | None:
    chunks = run.engine.chunks
    weights = gather_parts(parameter_parts(chunks))
    metrics, routing = _pass(run, spec, step=0, update=False)
    gradients = gather_parts(gradient_parts(chunks))
    curve = [_pass(run, spec, step, update=True) for step in range(curve_steps)]
    if weights is None or gradients is None or routing is None:  # another rank than 0
        return None
    found = Measurement(
        sums=metrics.depth_sums.tolist(),
        losses=metrics.losses,
        counts=metrics.depth_counts.tolist(),
        acceptance=metrics.acceptance.tolist(),
        router=metrics.router,
        routing=routing,
        curve=[step.losses for step, _ in curve],
        routing_curve=[maps for _, maps in curve if maps is not None],
    )
    found.weights, found.weight_spread = whole_tensors(weights)
    found.gradients, found.gradient_spread = whole_tensors(gradients)
    return found


def _pass(
    run: Run, spec: BatchSpec, step: int, *, update: bool
) -> tuple[BatchMetrics, dict[RouterCall, Tensor] | None]:
    cfg, engine = run.cfg, run.engine
    builder = run.data.builder(seeded_samples(spec, step), cfg.train.micro_batch_size)
    batch = builder.build(step, np.arange(spec.num_samples))
    recorder = RoutingRecorder(
        [unwrap(chunk) for chunk in engine.chunks],
        batch.places,
        spec.seq_length,
        run.groups,
        sequence_parallel=cfg.model.sequence_parallel,
    )
    loss_factor = run.resolved.loss_factor.at(0)
    metrics = engine.train(batch, loss_factor) if update else engine.forward_backward(batch, loss_factor)
    return metrics, gather_routing(recorder.parts(), spec.num_samples, spec.seq_length)
