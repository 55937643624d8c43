"""The worked examples of docs/extending.md run, and do what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mtp import pretrain
from megatron_mtp.convert.hf_config import hf_config_dict, model_config_from_hf
from megatron_mtp.convert.hf_families import FAMILIES
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.parallel.params import count_parameters
from tests.training.test_pretrain import tiny

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
MAX_LINES = 25


def example(title: str) -> str:
    """The Python code of the section `title`."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return code


def run(title: str, without: str = "\0") -> dict[str, Any]:
    """The names that an example defines; lines that begin with `without` are left out."""
    names: dict[str, Any] = {}
    exec("\n".join(line for line in example(title).splitlines() if not line.startswith(without)), names)
    return names


@pytest.mark.unit
@pytest.mark.parametrize("title", re.findall(r"^## (.*)$", PAGE, flags=re.MULTILINE)[:-1])
def test_examples_are_short(title: str):
    code = [line for line in example(title).splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert 5 < len(code) < MAX_LINES


@pytest.mark.dist
def test_a_metric(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    callback = run("A metric", without="pretrain")["SmoothGradNorm"]
    cfg = tiny(tmp_path, train_iters=2)
    cfg.model.num_layers = 2
    cfg.checkpoint.save = cfg.checkpoint.load = str(tmp_path / "run")
    cfg.logger.tensorboard_dir = str(tmp_path / "tb")
    pretrain(cfg, callbacks=[callback()])
    cfg.train.train_iters = 4
    pretrain(cfg, callbacks=[callback()])
    steps = read_metrics(tmp_path / "metrics.jsonl")
    mean, expected = None, []
    for norm in (step["grad-norm"] for step in steps):
        mean = norm if mean is None else 0.9 * mean + 0.1 * norm
        expected.append(mean)
    assert [step["grad/smooth_norm"] for step in steps] == pytest.approx(expected)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [event.value for event in events.Scalars("grad/smooth_norm")] == pytest.approx(expected)
    assert "".join(capfd.readouterr()).count("grad/smooth_norm: ") == len(expected) == 4


@pytest.mark.dist
def test_a_health_sign(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    cfg = tiny(tmp_path, train_iters=40)
    cfg.model.num_layers = 2
    cfg.optimizer.lr = cfg.optimizer.min_lr = 10.0
    cfg.scheduler.lr_warmup_iters = 35
    pretrain(cfg, callbacks=[run("A health sign")["WatchNorm"]()])
    assert "the gradient norm has doubled since the start. Lower optimizer.lr." in "".join(capfd.readouterr())


@pytest.mark.unit
def test_a_machine(capsys: pytest.CaptureFixture[str]):
    names = run("A machine for the planner")
    assert 0 < names["plan"].mfu < 1
    assert names["plan"].layout.string in capsys.readouterr().out


@pytest.mark.unit
def test_a_family():
    try:
        model = run("A model family")["qwen2_500m_pretrain_config"]().finalize().model
        assert round(count_parameters(model).main / 1e9, 2) == 0.49
        config = hf_config_dict(model, "qwen2")
        assert config["architectures"] == ["Qwen2ForCausalLM"]
        assert model_config_from_hf(config).num_query_groups == 2
    finally:
        FAMILIES.pop("qwen2", None)
