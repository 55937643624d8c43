"""What a run plans, as plain data for its `start` record, and what it measures beside it: memory of each stage."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from megatron_mtp.config.machines import find_machine
from megatron_mtp.config.units import GIB
from megatron_mtp.device.memory_meter import peak_resident_bytes
from megatron_mtp.parallel.card import milestones
from megatron_mtp.parallel.planner.auto_layout import machine_of, make_planner
from megatron_mtp.parallel.planner.planner import Planner
from megatron_mtp.parallel.planner.split import Split
from megatron_mtp.parallel.resolve import ResolvedRun
from megatron_mtp.training.setup import Run


def run_facts(run: ResolvedRun, *, is_cpu: bool) -> dict[str, Any]:
    """Plan and schedule of a run, for readers of its log.

    Args:
        run: with a known vocabulary size.
        is_cpu: the plan is for CPUs whatever dist.hardware says.

    Returns:
        `milestones`: a list of {"step", "what"}; `plan`: {"machine", "memory", "step_ms", "schedule"}, where memory
        has the bytes of each stage by kind and schedule what `parallel.planner.simulate` needs, None with one stage.
    """
    machine = find_machine("cpu") if is_cpu else machine_of(run.cfg)
    planner = make_planner(run, machine)
    plan = planner.plan(run.layout)
    return {
        "milestones": [{"step": m.step, "what": m.what} for m in milestones(run)],
        "plan": {
            "machine": machine.name,
            "memory": [asdict(stage.memory) for stage in plan.stages],
            "step_ms": asdict(plan.step),
            "schedule": _schedule(planner, run) if run.layout.pp > 1 else None,
        },
    }


def _schedule(planner: Planner, run: ResolvedRun) -> dict[str, Any]:
    problem = planner.problem()
    work = problem.work(Split.of(run.layout))
    return {
        "num_microbatches": problem.kind.num_microbatches,
        "sends_block": problem.kind.sends_block,
        "chunks_ms": [[[time.forward_ms, time.backward_ms] for time in stage] for stage in work.chunks],
        "message_ms": list(work.message_ms),
        "shapes_ms": work.shapes_ms,
    }


def peak_memory_by_stage(run: Run) -> dict[str, float]:
    """A collective: the largest peak so far of any rank of each pipeline stage, in GiB.

    On a GPU the most that the allocator gave to tensors; on a CPU the largest resident set of the process.
    """
    peaks = torch.zeros(run.resolved.layout.pp, dtype=torch.float64, device=run.device.torch_device)
    used = torch.cuda.max_memory_allocated() if run.device.is_cuda else peak_resident_bytes()
    peaks[run.groups.pp.rank()] = used / GIB
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    return {f"perf/peak_memory_gib_stage_{stage}": peak for stage, peak in enumerate(peaks.tolist())}
