"""Running out of memory ends with who, planned against used, and remedies that are real."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.errors import OutOfMemoryError
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.recipes import get_recipe
from megatron_mtp.training.guards.out_of_memory import explained_out_of_memory, is_out_of_memory, peak_bytes, remedies

pytestmark = pytest.mark.unit
PP2 = (
    "model.pipeline_model_parallel_size=2",
    "model.pipeline_model_parallel_layout=[3,1]",
    "dist.device=cpu",
    "train.micro_batch_size=4",
)
WRITTEN = (PP2[0], "model.pipeline_model_parallel_layout=Ettt|tmmL")
# The limit is set when everything is imported, so that only the model can break it.
LIMITED = """
import resource, sys
from megatron_mtp.cli.main import main
from megatron_mtp.observe.logs import silence_noise
silence_noise()
import megatron_mtp.training.pretrain, psutil
room = psutil.Process().memory_info().vms + 2**29
resource.setrlimit(resource.RLIMIT_AS, (room, room))
main(sys.argv[1:])
"""


def make(*overrides: str, world_size: int = 2) -> ConfigContainer:
    cfg = get_recipe("tiny_dense")
    apply_overrides(cfg, list(overrides))
    return cfg.finalize(world_size)


def test_which_errors_are_about_memory():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory")
    )
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_message_names_rank_stage_plan_use_and_remedies():
    run = resolve(make(*PP2), 2)
    with pytest.raises(OutOfMemoryError) as caught, explained_out_of_memory(run, rank=1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")
    first, planned, now, *found = str(caught.value).splitlines()
    assert first.startswith("rank 1 of 2, pipeline stage 1 of 2 (tmmL), ran out of memory: CUDA out of memory.")
    assert "More of it" not in first
    assert planned.startswith("planned for this stage: ")
    assert all(part in planned for part in ("weights", "optimizer", "activations", "Used: "))
    assert now.startswith("What each remedy")
    names = [line.split(":")[0].split("=")[0].strip() for line in found]
    assert {"model.mtp_num_layers", "model.recompute_granularity", "train.micro_batch_size"} <= set(names)
    assert "model.pipeline_model_parallel_size" not in names, "4 stages do not fit on 2 ranks"


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shape"), explained_out_of_memory(resolve(make(), 2), rank=0):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize(
    "overrides",
    [
        PP2,
        WRITTEN,
        ("model.mtp_depth_weights=[1,0.5]", "train.micro_batch_size=2", "ddp.use_distributed_optimizer=false"),
    ],
    ids=["pp2", "written layout", "dp2"],
)
def test_remedies_are_configs_that_plan_lower(overrides):
    run = resolve(make(*overrides, world_size=4), 4)
    found = remedies(run, is_cpu=True)
    assert [remedy.peak_bytes for remedy in found] == sorted(remedy.peak_bytes for remedy in found)
    assert found[-1].peak_bytes < peak_bytes(run, is_cpu=True)
    for remedy in found:
        trial = get_recipe("tiny_dense")
        changes = [*overrides, *remedy.changes.split()]
        if "mtp_num_layers" in remedy.changes:
            changes = [change for change in changes if "depth_weights" not in change]
        apply_overrides(trial, changes)
        assert peak_bytes(resolve(trial.finalize(4), 4), is_cpu=True) == remedy.peak_bytes


def test_a_frugal_config_has_no_remedy():
    cfg = make(
        "model.mtp_num_layers=0", "train.micro_batch_size=1", "model.pipeline_model_parallel_size=2",
        "model.num_layers=2", "model.recompute_granularity=full", "model.recompute_method=uniform",
        "model.recompute_num_layers=1",
    )  # fmt: skip
    assert remedies(resolve(cfg, 2), is_cpu=True) == []


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("model.vocab_size=400000", "model.hidden_size=512"), marks=pytest.mark.slow),
        ("model.seq_length=8192", "model.hidden_size=512", "train.micro_batch_size=8"),
    ],
    ids=["while the model is built", "in the first step"],
)
def test_a_run_that_does_not_fit_ends_with_the_message(overrides):
    command = [sys.executable, "-W", "ignore", "-c", LIMITED, "pretrain", "tiny_dense", "dist.device=cpu", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "rank 0 of 1, pipeline stage 0 of 1 (EttttmmL), ran out of memory" in done.stderr
    assert "model.mtp_num_layers=0:" in done.stderr
    assert re.search(r"limited to \d+\.\d+ GiB for the address space of this process \(ulimit -v\), ", done.stderr)
    assert "which may be less than the machine has free" in done.stderr
    assert "Traceback" not in done.stderr
