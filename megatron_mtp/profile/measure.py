"""Part times of one rank: a small model trains, and its calls are cut into parts."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_mtp.config import ConfigContainer
from megatron_mtp.device.host_memory import keep_freed_memory
from megatron_mtp.device.process_group import job_size
from megatron_mtp.mcore.optimizer import guarded_step
from megatron_mtp.mcore.schedules import watch_calls
from megatron_mtp.model.mtp import MTPModel
from megatron_mtp.model.sharded import unwrap
from megatron_mtp.parallel.planner.part_costs import ZERO, Link, PartCosts, PartTime
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.profile.part_timer import Clock, PartTimer, Segments
from megatron_mtp.training.setup import setup

WARMUP_STEPS = 2
UNMEASURED = Link(latency_ms=0.0, gb_per_s=float("inf"))


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step outside its chunk calls, in milliseconds.

    Attributes:
        gradients: emptying and finishing the gradient buffers.
        rest: counts, the schedule, reductions of metrics.
        update: gradient norm, clipping, the update.
    """

    gradients: float
    rest: float
    update: float


class PartMeasurement:
    """Trains the model of `profile_config` in the group that this process is in, and times its parts.

    Args:
        cfg: finalized for the size of the group.
    """

    def __init__(self, cfg: ConfigContainer):
        self.run = setup(resolve(cfg, job_size()))
        if not self.run.device.is_cuda:
            keep_freed_memory()  # as a run does
        chunk = unwrap(self.run.engine.chunks[0])
        assert isinstance(chunk, MTPModel)
        self._chunk, self._clock = chunk, Clock(self.run.device.torch_device)
        self._kinds = self.run.resolved.layer_kinds
        self._timer = PartTimer(self._chunk, self._kinds, self._clock)
        objective = self.run.engine.objective
        timed = replace(objective, heads=self._timer.watch_heads(objective.heads))
        self._engine = replace(self.run.engine, objective=timed)
        self._factor = self.run.resolved.loss_factor.at(0)
        self._batches = self.run.data.train()
        self._finish = _Stopwatch(self._chunk.config.finalize_model_grads_func, self._clock)
        self._chunk.config.finalize_model_grads_func = self._finish
        self._steps: list[StepTimes] = []
        self._heads: dict[int, list[tuple[float, float]]] = {}
        for _ in range(WARMUP_STEPS):
            self._step()
        self._timer.forward.clear()
        self._timer.backward.clear()

    def advance(self, steps: int) -> float:
        """Times further steps; returns the processor time that they took in this process, in seconds."""
        start = time.process_time()
        for _ in range(steps):
            self._steps.append(self._step())
            self._time_heads()
        return time.process_time() - start

    def micro_batch_times(self) -> list[float]:
        """Milliseconds of both passes of every micro-batch so far."""
        passes = zip(self._timer.forward, self._timer.backward, strict=True)
        return [sum(forward.values()) + sum(backward.values()) for forward, backward in passes]

    def costs(self) -> PartCosts:
        """Medians over all calls and steps so far; the links are not measured here."""
        forward, backward = _medians(self._timer.forward), _medians(self._timer.backward)
        depths = self.run.engine.objective.num_depths

        def part(name: str, count: float = 1) -> PartTime:
            return PartTime(forward.get(name, 0.0), backward.get(name, 0.0)) * (1 / count)

        heads, share = part("head"), self._head_share()
        head = PartTime(heads.forward_ms * share.forward_ms, heads.backward_ms * share.backward_ms)
        parameters = sum(parameter.numel() for parameter in self._chunk.parameters())
        return PartCosts(
            embedding=part("embedding"),
            layer={kind: part(kind, self._kinds.count(kind)) for kind in dict.fromkeys(self._kinds)},
            final_norm=part("final_norm"),
            mtp_layer=part("mtp", depths) if depths else ZERO,
            head=head,
            mtp_head=(heads + head * -1) * (1 / depths) if depths else ZERO,
            chunk=part("other"),
            step_ms=max(0.0, median(step.rest for step in self._steps)),
            update_ns_per_parameter=median(step.gradients for step in self._steps) * 1e6 / parameters,
            optimizer_ns_per_parameter=median(step.update for step in self._steps) * 1e6 / parameters,
            pipeline_link=UNMEASURED,
            data_link=UNMEASURED,
        )

    def close(self) -> None:
        """Removes hooks and model; the process stays in its group."""
        self._timer.remove()
        self.run.release()
        del self.run, self._engine, self._chunk
        gc.collect()

    def _step(self) -> StepTimes:
        engine, timer, clock = self._engine, self._timer, self._clock
        batch, calls = next(self._batches), len(self._timer.forward)
        start = clock.now()
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()
        engine.optimizer.zero_grad()
        zeroed = clock.now()
        with watch_calls(timer.around):
            engine.forward_backward(batch, self._factor)
        passed = clock.now()
        guarded_step(engine.optimizer, lambda _: True)
        updated = clock.now()
        in_calls = sum(sum(call.values()) for call in timer.forward[calls:] + timer.backward[calls:])
        gradients = clock.ms(start, zeroed) + self._finish.ms
        # forward_backward empties the buffers a second time.
        return StepTimes(gradients, clock.ms(zeroed, passed) - in_calls - gradients, clock.ms(passed, updated))

    def _time_heads(self) -> None:
        """One pass of depth 0 through the heads, and one of all depths."""
        engine, clock, group = self.run.engine, self._clock, self.run.groups.tp
        batch = next(self._batches).micro_batches[0].to(engine.device)
        weight, depths = self._chunk.head_weight(), engine.objective.num_depths
        rows = batch.tokens.shape[1] // (group.size() if self.run.cfg.model.sequence_parallel else 1)
        shape = (1 + depths, rows, batch.tokens.shape[0], weight.shape[1])
        states = torch.randn(shape, dtype=weight.dtype, device=engine.device)
        for count in {1, 1 + depths}:
            part = states[:count].clone().requires_grad_()
            inputs = replace(batch, labels=batch.labels[:count], loss_mask=batch.loss_mask[:count])
            start = clock.now()
            total = engine.objective.heads(part, weight, inputs, torch.ones(count, device=engine.device), 1.0).total
            middle = clock.now()
            total.backward()
            times = (clock.ms(start, middle), clock.ms(middle, clock.now()))
            self._heads.setdefault(count, []).append(times)

    def _head_share(self) -> PartTime:
        """Share of depth 0 in the heads' time: the weight's gradient is computed once for all depths."""
        one, every = ([median(column) for column in zip(*self._heads[n], strict=True)] for n in (1, max(self._heads)))
        return PartTime(min(1.0, one[0] / every[0]), min(1.0, one[1] / every[1]))


class _Stopwatch:
    """Stamps the last call of a function."""

    def __init__(self, function: Any, clock: Clock):
        self._function, self._clock = function, clock
        self._stamps: tuple[Any, Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = self._clock.now()
        result = self._function(*args, **kwargs)
        self._stamps = (start, self._clock.now())
        return result

    @property
    def ms(self) -> float:
        """Time of the last call."""
        assert self._stamps is not None
        return self._clock.ms(*self._stamps)


def _medians(calls: list[Segments]) -> Segments:
    return {name: median(call.get(name, 0.0) for call in calls) for name in {name for call in calls for name in call}}


def measure_links(device_type: str) -> tuple[Link, Link]:
    """(pipeline link, data link): messages between ranks 0 and 1, and a reduce-scatter over all ranks.

    Every rank returns the same.
    """
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    clock, rank = Clock(device), dist.get_rank()
    small, large = (torch.zeros(count, dtype=torch.float32, device=device) for count in (256, 2**21))

    def ping_pong(tensor: torch.Tensor) -> None:
        if rank < 2:
            (dist.send if rank == 0 else dist.recv)(tensor, 1 - rank)
            (dist.recv if rank == 0 else dist.send)(tensor, 1 - rank)

    def reduce_scatter(tensor: torch.Tensor) -> None:
        dist.reduce_scatter_tensor(tensor.new_empty(tensor.numel() // dist.get_world_size()), tensor)

    def link(call: Any, messages: int) -> Link:
        low, high = (_median_ms(clock, call, tensor) / messages for tensor in (small, large))
        return Link(latency_ms=low, gb_per_s=large.nbytes / 1e6 / max(high - low, 1e-6))

    found = [(link(ping_pong, 2), link(reduce_scatter, 1))]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _median_ms(clock: Clock, call: Any, tensor: torch.Tensor, repeats: int = 15) -> float:
    times = []
    for _ in range(repeats + 3):
        dist.barrier()
        start = clock.now()
        call(tensor)
        times.append(clock.ms(start, clock.now()))
    return median(times[3:])
