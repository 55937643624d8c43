"""`pretrain --dry-run`, as typed."""

from __future__ import annotations

import json

import pytest

from megatron_mtp.cli.main import main
from megatron_mtp.observe.failure_file import FAILURE_DIR

pytestmark = pytest.mark.unit
PP2 = ("model.pipeline_model_parallel_size=2", "model.pipeline_model_parallel_layout=[3,1]")


@pytest.fixture
def run(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", FAILURE_DIR):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["pretrain", "tiny_dense", *arguments])
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return call


def test_the_report_names_config_stages_and_totals(run):
    code, out, _ = run("--dry-run", *PP2)
    assert code == 0
    assert "pipeline_model_parallel_size: 2" in out
    assert "2 ranks, layout Ettt|tmmL" in out
    assert "180,704" in out
    assert "complete model: 378,240 parameters" in out


def test_as_json_for_a_larger_job(run):
    code, out, _ = run("--dry-run", "--json", "--world-size", "4", *PP2)
    data = json.loads(out)
    assert code == 0
    assert data["world_size"] == 4
    assert [stage["ranks"] for stage in data["stages"]] == [[0, 1], [2, 3]]
    assert data["parameters"] == data["predicted_parameters"] == 378240
    assert data["config"]["model"]["num_layers"] == 4


def test_problems_end_it_with_one_message(run):
    code, out, err = run("--dry-run", "--json", "dataset.blend=[/nowhere/data]")
    assert code == 2
    assert json.loads(out)["problems"]
    assert "/nowhere/data" in err
    assert "Traceback" not in err


def test_a_world_size_that_does_not_divide_is_refused_before_anything_is_built(run):
    code, out, err = run("--dry-run", "--world-size", "3", *PP2)
    assert (code, out) == (2, "")
    assert "world_size = 3" in err
    assert "a multiple of 2" in err


def test_its_options_belong_to_it(run):
    assert "--dry-run" in run("--json")[2]
    assert "--dry-run" in run("--world-size", "2")[2]
    assert "--dry-run" in run("--hardware", "h100")[2]


def test_an_unknown_device_is_refused_with_the_nearest(run):
    code, _, err = run("--dry-run", "--hardware", "h10")
    assert code == 2
    assert "Did you mean h100?" in err
