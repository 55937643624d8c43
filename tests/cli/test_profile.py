"""`profile`, as typed."""

from __future__ import annotations

import pytest

from megatron_mtp.cli.main import main
from megatron_mtp.observe.failure_file import FAILURE_DIR
from megatron_mtp.parallel.planner.part_costs import Profile


@pytest.fixture
def run(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", FAILURE_DIR):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["profile", "tiny_dense", "dist.device=cpu", *arguments])
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return call


@pytest.mark.dist
def test_the_file_is_written_and_plans(run, tmp_path, capsys):
    path = tmp_path / "profile.json"
    sizes = ("model.pipeline_model_parallel_size=2", "model.tensor_model_parallel_size=1")
    code, out, err = run("--output", str(path), "--steps", "1", *sizes)
    assert code == 0, err
    assert "MTP layer" in out
    assert Profile.read(path).notes["processes"] == 2
    with pytest.raises(SystemExit) as caught:
        main(["plan", "tiny_dense", *sizes, "--profile", str(path)])
    assert not caught.value.code
    assert "ms" in capsys.readouterr().out


@pytest.mark.unit
def test_a_file_that_cannot_be_written_is_refused_at_once(run, tmp_path):
    code, _, err = run("--output", str(tmp_path / "none" / "profile.json"))
    assert code == 2
    assert "cannot be written" in err


@pytest.mark.unit
def test_processes_come_in_stages(run, tmp_path):
    code, _, err = run("--output", str(tmp_path / "p.json"), "--nproc", "3", "model.tensor_model_parallel_size=2")
    assert code == 2
    assert "a multiple of 2" in err
