"""What is looked at before the first step, and replicas that drifted apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mtp.errors import ConfigError, ReplicaError
from megatron_mtp.training.callbacks.replicas import check_replicas, fingerprint
from megatron_mtp.training.guards import node_check
from megatron_mtp.training.guards.node_check import (
    Node,
    bandwidth_report,
    check_nodes,
    clock_report,
    version_problems,
)
from tests.checkpoint.rig import DENSE, EP2, MOE, make_config, rig


@pytest.mark.unit
def test_versions_that_differ_are_named():
    same = {"torch": "2.15.0", "numpy": "2.0"}
    assert version_problems([Node("a", same), Node("b", same)]) == []
    (problem,) = version_problems([Node("a", same), Node("b", {**same, "torch": "2.11.0"}), Node("b", same)])
    assert problem.startswith(
        "torch: versions differ between ranks (2.15.0 on a (ranks 0), b (ranks 2); 2.11.0 on b (ranks 1))"
    )
    assert "none on a (ranks 0)" in version_problems([Node("a", {}), Node("b", {"torch": "1"})])[0]


@pytest.mark.unit
def test_slow_links_are_named_among_their_kind():
    hosts = ["a", "a", "b", "b", "c", "c"]
    lines = bandwidth_report([9e9, 1e9, 9.5e9, 0.2e9, 4e9, 1.2e9], hosts)
    assert lines[0] == "bandwidth within a machine: 9.00 GB/s from each rank to the next (median of 3)"
    assert lines[1] == "slow link within a machine: rank 4 on c to rank 5 on c, 4.00 GB/s"
    assert lines[2].startswith("bandwidth between machines: 1.00 GB/s")
    assert lines[3:] == ["slow link between machines: rank 3 on b to rank 4 on c, 0.20 GB/s"]


@pytest.mark.unit
def test_a_clock_that_differs_is_named():
    hosts = ["a", "a", "b", "b", "c"]
    assert clock_report([100.0, 100.2, 99.9, 100.0, 100.5], hosts) == []
    assert clock_report([100.0, 100.0, 98.5, 98.5, 137.0], hosts) == [
        "clock of b: 1.5 s behind the median. Synchronize it (NTP).",
        "clock of c: 37.0 s ahead of the median. Synchronize it (NTP).",
    ]


def checked(folder: str, is_shared: bool, torch_versions: list[str]) -> str:
    own = folder if is_shared else f"{folder}/{dist.get_rank()}"
    original, node_check.VISIBLE_S = node_check._versions, 0.5
    node_check._versions = lambda device: {"torch": torch_versions[dist.get_rank()]}
    try:
        check_nodes(make_config(DENSE, 2, own), torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    finally:
        node_check._versions = original
    return ""


@pytest.mark.dist
def test_the_nodes_of_a_job(ranks, tmp_path: Path):
    assert ranks(2).run(checked, str(tmp_path / "run"), True, ["2", "2"]) == ["", ""]
    assert list((tmp_path / "run").iterdir()) == [], "it leaves nothing behind"
    for text in ranks(2).run(checked, str(tmp_path / "apart"), False, ["2", "1"]):
        assert "torch: versions differ" in text
        assert "(ranks 1) do not see what rank 0" in text


def drifted(values: dict, name: str | None) -> str:
    with rig(make_config(values, 2)) as run:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        run.steps(1)
        if name and dist.get_rank() == 1:
            weight = next(w for n, w in run.chunks[0].named_parameters() if name in n)
            weight.data.view(torch.int32).flatten()[3] ^= 1
        try:
            check_replicas(run.chunks, groups)
        except ReplicaError as error:
            return str(error)
    return ""


@pytest.mark.dist
@pytest.mark.parametrize("values", [DENSE, {**DENSE, "ddp.use_distributed_optimizer": False}], ids=["sharded", "whole"])
def test_one_bit_of_one_replica_is_found(ranks, values: dict):
    assert ranks(2).run(drifted, values, None) == ["", ""]
    for text in ranks(2).run(drifted, values, "linear_proj.weight"):
        assert "linear_proj.weight" in text


@pytest.mark.dist
def test_experts_of_different_ranks_are_not_compared(ranks):
    assert ranks(2).run(drifted, {**MOE, **EP2}, None) == ["", ""]


@pytest.mark.unit
def test_any_bit_changes_the_fingerprint():
    tensor = torch.randn(37, 3)
    before = fingerprint(tensor)
    for bit in (0, 13, 31):
        changed = tensor.clone()
        changed.view(torch.int32)[5, 1] ^= 1 << bit if bit < 31 else -(2**31)
        assert fingerprint(changed) != before
