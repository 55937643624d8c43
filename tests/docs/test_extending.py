"""The worked examples of docs/extending.md, run as they are written, each in under 25 lines of a user's code."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mtp import pretrain
from megatron_mtp.observe.jsonl import read_metrics
from tests.training.test_pretrain import tiny

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"```\w+\n# (\S+)\n(.*?)```", PAGE, flags=re.S))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the examples as files, on the path of imports."""
    for name, body in EXAMPLES.items():
        (tmp_path / name).write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def example(folder: Path, name: str) -> ModuleType:
    assert (folder / f"{name}.py").exists()
    importlib.invalidate_caches()
    return importlib.import_module(name)


def short(folder: Path, **train: int):
    cfg = tiny(folder / "log", **{"train_iters": 4, **train})
    cfg.model.num_layers, cfg.validation.eval_iters = 2, 1
    return cfg


def test_examples_are_short():
    assert set(EXAMPLES) == {
        "targets_seen.py",
        "masked_share.py",
        "early_stop.py",
        "mtp_activations.py",
        "mtp_gradient.py",
        "gradient_sign.py",
        "my_cluster.yaml",
        "mistral_family.py",
        "fading.py",
    }
    for name, body in EXAMPLES.items():
        code = [line for line in body.splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(code) < 25, name


def test_a_metric(folder: Path, capfd: pytest.CaptureFixture[str]):
    kind = example(folder, "targets_seen").TargetsSeen
    cfg = short(folder)
    cfg.checkpoint.save = cfg.checkpoint.load = str(folder / "run")
    cfg.logger.tensorboard_dir = str(folder / "tb")
    cfg.train.exit_interval = 2
    pretrain(cfg, callbacks=[kind()])
    pretrain(cfg, callbacks=[kind()])
    per_step = cfg.train.global_batch_size * cfg.model.seq_length
    expected = [per_step * step for step in (1, 2, 3, 4)]
    assert [step["data/targets_seen"] for step in read_metrics(folder / "log" / "metrics.jsonl")] == expected
    lines = [line for line in "".join(capfd.readouterr()).splitlines() if "elapsed time" in line]
    assert all(f"data/targets_seen: {value}" in line for value, line in zip(expected, lines, strict=True))
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    assert [event.value for event in events.Scalars("data/targets_seen")] == expected


NAMES = ["masked_share.py:MaskedShare", "mtp_activations:MTPActivations"]


def one_rank(folder: Path):
    cfg = short(folder, train_iters=2, global_batch_size=8)
    cfg.dataset.eod_mask_loss, cfg.train.callbacks = True, NAMES
    pretrain(cfg)
    return read_metrics(folder / "log" / "metrics.jsonl")


def test_metrics_over_micro_batches(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    for step in one_rank(folder):
        assert 0 < step["data/masked_share"] == pytest.approx(1 - step["lm/num_targets"] / (8 * 64), abs=1e-12)
        assert step["mtp/largest_activation"] > 0


@pytest.mark.slow
def test_metrics_over_micro_batches_and_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Two pipeline stages started by the command, which names the callbacks by file and module, and one rank."""
    monkeypatch.chdir(folder)
    arguments = ["tiny_dense", "dist.device=cpu", "train.train_iters=2", "validation.eval_iters=1", "--nproc", "2"]
    arguments += ["model.num_layers=2", "train.global_batch_size=8", "dataset.eod_mask_loss=true"]
    arguments += ["model.pipeline_model_parallel_size=2", "logger.log_dir=two", "--callback", NAMES[0]]
    command = [sys.executable, "-m", "megatron_mtp", "pretrain", *arguments, "--callback", NAMES[1]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, timeout=200)
    for step, other in zip(one_rank(folder), read_metrics("two/metrics.jsonl"), strict=True):
        assert other["data/masked_share"] == step["data/masked_share"]
        assert other["mtp/largest_activation"] == pytest.approx(step["mtp/largest_activation"], rel=1e-4)
    (start,) = read_metrics("two/metrics.jsonl", "start")
    assert start["config"]["train"]["callbacks"] == NAMES


def test_the_gradient_of_chosen_parameters(folder: Path):
    """Parts of the model have parts of the norm that is recorded, before it is clipped to 0.1."""
    cfg = short(folder, train_iters=2)
    cfg.optimizer.clip_grad = 0.1
    pretrain(cfg, callbacks=[example(folder, "mtp_gradient").MTPGradient()])
    for step in read_metrics(folder / "log" / "metrics.jsonl"):
        parts = [step[f"grad-norm/{name}"] for name in ("mtp", "embedding", "layer_0")]
        assert all(part > 0 for part in parts)
        assert 0.1 < sum(part**2 for part in parts) ** 0.5 < step["grad-norm"]


def test_stop_early(folder: Path, caplog: pytest.LogCaptureFixture):
    kind = example(folder, "early_stop").EarlyStop
    cfg = short(folder, train_iters=8)
    cfg.optimizer.lr, cfg.optimizer.min_lr, cfg.scheduler.lr_warmup_iters = 1e-30, 0.0, 0  # the loss stays as it is
    cfg.validation.eval_interval = 1
    cfg.checkpoint.save = cfg.checkpoint.load = str(folder / "run")
    cfg.train.exit_interval = 2
    pretrain(cfg, callbacks=[kind(patience=3)])
    cfg.train.exit_interval = None
    with caplog.at_level("INFO", logger="megatron_mtp.training.pretrain"):
        done = pretrain(cfg, callbacks=[kind(patience=3)])
    assert (done.state.iteration, done.exit_code) == (4, 0), "what it saw before the resume counts"
    assert f"left after iteration 4: {done.stop_reason}" in caplog.messages
    assert "in 3 evaluations" in done.stop_reason
    waited = [e["early_stop/waited"] for e in read_metrics(folder / "log" / "metrics.jsonl", "evaluation")]
    assert waited == [0, 1, 2, 3]
    assert (folder / "run" / "iter_0000004").is_dir()


def test_a_health_sign(folder: Path, capfd: pytest.CaptureFixture[str]):
    sign = example(folder, "gradient_sign").GradientSign()
    cfg = short(folder, train_iters=40)
    # The learning rate rises far too high, and nothing is clipped.
    cfg.optimizer.lr, cfg.optimizer.clip_grad, cfg.scheduler.lr_warmup_iters = 3.0, 0.0, 60
    pretrain(cfg, callbacks=[sign])
    assert "iteration 40: the gradient norm has doubled" in "".join(capfd.readouterr())
    cfg = short(folder, train_iters=40)
    pretrain(cfg, callbacks=[sign])
    assert "has doubled" not in "".join(capfd.readouterr())


def test_a_machine(folder: Path):
    from megatron_mtp.config.machines import MACHINES
    from megatron_mtp.config.overrides import apply_yaml
    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.recipes import get_recipe

    cfg = get_recipe("qwen3_30b_a3b")
    cfg.model.pipeline_model_parallel_size, cfg.model.vocab_size = 2, 151936
    apply_yaml(cfg, folder / "my_cluster.yaml")
    machine = resolve(cfg.finalize(64), 64).planned.machine
    assert (machine.name, machine.network_gb_per_s, machine.node_size) == ("h100-ethernet", 25, 4)
    assert machine.memory_gib == MACHINES["h100"].memory_gib


def test_a_model_family(folder: Path, monkeypatch: pytest.MonkeyPatch):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    from megatron_mtp.convert.exporting import export_hf
    from megatron_mtp.convert.hf_families import FAMILIES
    from megatron_mtp.convert.importing import import_hf

    monkeypatch.setattr("megatron_mtp.convert.hf_families.FAMILIES", FAMILIES)  # restored afterwards
    try:
        cfg = example(folder, "mistral_family").mistral_7b_pretrain_config()
        assert cfg.model.rotary_base == 1_000_000
        torch.manual_seed(1)
        config = transformers.MistralConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=None,
        )
        transformers.MistralForCausalLM(config).save_pretrained(folder / "theirs")
        import_hf(folder / "theirs", folder / "ours")
        export_hf(folder / "ours", folder / "back", family="mistral")
        before, after = (load_file(folder / name / "model.safetensors") for name in ("theirs", "back"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert transformers.AutoConfig.from_pretrained(folder / "back").model_type == "mistral"
    finally:
        FAMILIES.pop("mistral", None)


def test_a_prediction_variant(folder: Path):
    losses = {}
    for variant in ("sequential", "fading:FADING"):
        cfg = short(folder, train_iters=2)
        cfg.model.mtp_variant = variant
        pretrain(cfg)
        losses[variant] = read_metrics(folder / "log" / "metrics.jsonl")[0]
    first, second = losses.values()
    assert first["lm loss"] == second["lm loss"]
    assert first["mtp_1 loss"] == second["mtp_1 loss"]
    assert first["mtp_2 loss"] != second["mtp_2 loss"]
