"""The trace of a run: its ranges name stage, chunk, micro-batch, depth and phase, in the steps that were asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_mtp import pretrain
from megatron_mtp.config import ConfigContainer
from tests.training.test_pretrain import tiny

pytestmark = pytest.mark.dist


def profiled(folder: Path, start: int, end: int, **model: Any) -> ConfigContainer:
    cfg = tiny(folder, train_iters=4, global_batch_size=4, micro_batch_size=1)
    cfg.validation.eval_iters, cfg.validation.eval_interval = 1, 2
    cfg.profiling.use_pytorch_profiler, cfg.profiling.profile_dir = True, str(folder / "traces")
    cfg.profiling.profile_step_start, cfg.profiling.profile_step_end = start, end
    for name, value in model.items():
        setattr(cfg.model, name, value)
    return cfg


def ranges(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The named ranges of a rank's trace, in order."""
    (trace,) = (folder / "traces").glob(f"rank{rank}.*.json")
    events = json.loads(trace.read_text())["traceEvents"]
    return sorted((event for event in events if event.get("cat") == "user_annotation"), key=lambda event: event["ts"])


def test_ranges_name_stage_depth_and_phase(tmp_path: Path):
    pretrain(profiled(tmp_path, 1, 3))
    found = ranges(tmp_path)
    counts = Counter(re.sub(r"micro-batch \d", "micro-batch", event["name"]) for event in found)
    steps, calls = 2, 2 * 4
    assert counts["stage 0 chunk 0 forward, micro-batch"] == counts["stage 0 chunk 0 backward, micro-batch"] == calls
    evaluated = 4  # micro-batches of iteration 2's evaluation, before the trace ends
    for depth in (1, 2):
        assert counts[f"depth {depth} forward"] == calls + evaluated
        assert counts[f"depth {depth} backward"] == calls
    assert counts["update"] == counts["forward and backward"] == counts["data"] == steps
    assert counts["stage 0 evaluation"] == evaluated
    assert not any("recompute" in name for name in counts)

    def inside(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
        return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1

    for phase in ("forward", "backward"):
        chunks = [event for event in found if re.match(f"stage 0 chunk 0 {phase}", event["name"])]
        assert [event["name"][-1] for event in chunks] == list("01230123")
        for depth in (event for event in found if event["name"] in (f"depth 1 {phase}", f"depth 2 {phase}")):
            evaluation = [event for event in found if event["name"] == "stage 0 evaluation"]
            assert sum(inside(depth, chunk) for chunk in [*chunks, *evaluation]) == 1
    order = [event["name"] for event in found if event["name"].startswith("depth") and "backward" in event["name"]]
    assert order[:2] == ["depth 2 backward", "depth 1 backward"]


@pytest.mark.slow
def test_a_resumed_run_counts_its_steps_from_the_start(tmp_path: Path):
    cfg = profiled(tmp_path, 3, 4)
    cfg.checkpoint.save = cfg.checkpoint.load = str(tmp_path / "checkpoints")
    cfg.train.exit_interval = 2
    pretrain(cfg)
    assert not list((tmp_path / "traces").glob("*"))
    cfg.train.exit_interval = None
    pretrain(cfg)
    counts = Counter(event["name"] for event in ranges(tmp_path))
    assert counts["update"] == 1
    again = profiled(tmp_path / "again", 0, 2)
    again.checkpoint.save = again.checkpoint.load = str(tmp_path / "checkpoints")
    again.train.train_iters = 5
    pretrain(again)  # the steps of the trace are done
    assert not (tmp_path / "again" / "traces").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "depths"),
    [
        ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, 2),
        ({"mtp_variant": "parallel"}, 2),
        ({"mtp_detach_heads": True}, 2),
        ({"mtp_num_layers": 0}, 0),
    ],
    ids=["recompute", "parallel", "detached", "no MTP"],
)
def test_ranges_of_other_models(tmp_path: Path, model: dict[str, Any], depths: int):
    pretrain(profiled(tmp_path, 1, 2, **model))
    counts = Counter(event["name"] for event in ranges(tmp_path))
    for depth in range(1, depths + 1):
        assert counts[f"depth {depth} backward"] == 4
        is_again = "recompute_granularity" in model or model.get("mtp_variant") == "parallel"
        assert counts[f"depth {depth} recompute"] == 4 * is_again
    assert f"depth {depths + 1} forward" not in counts


@pytest.mark.slow
def test_ranges_of_two_stages_with_virtual_stages(tmp_path: Path):
    fields = {
        "model.pipeline_model_parallel_size": 2,
        "model.virtual_pipeline_model_parallel_size": 2,
        "train.train_iters": 2,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 1,
        "validation.eval_iters": 0,
        "profiling.use_pytorch_profiler": True,
        "profiling.profile_dir": tmp_path / "traces",
        "profiling.profile_step_start": 1,
        "profiling.profile_step_end": 2,
        "profiling.profile_ranks": "[0,1]",
        "dist.device": "cpu",
        "logger.log_dir": tmp_path,
    }
    command = [sys.executable, "-m", "megatron_mtp", "pretrain", "tiny_dense", "--nproc", "2"]
    subprocess.run([*command, *(f"{name}={value}" for name, value in fields.items())], check=True, timeout=250)
    for rank in (0, 1):
        names = [event["name"] for event in ranges(tmp_path, rank)]
        calls = {name for name in names if name.startswith(f"stage {rank} chunk")}
        assert calls == {
            f"stage {rank} chunk {v} {phase}, micro-batch {n}"
            for v in (0, 1)
            for phase in ("forward", "backward")
            for n in range(4)
        }
        assert ("depth 1 backward" in names) == (rank == 1)
