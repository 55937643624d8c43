"""Complete runs in this process, on one rank: what a user's script does."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_mtp import ConfigContainer, pretrain
from megatron_mtp.data.indexed import IndexedWriter
from megatron_mtp.errors import CheckpointError, DataError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.dist


def tiny(folder: Path, name: str = "tiny_dense", **train: int) -> ConfigContainer:
    """A recipe that logs to `folder`."""
    cfg = get_recipe(name)
    cfg.logger.log_dir = str(folder)
    cfg.dist.device = "cpu"
    cfg.dist.num_threads = 1
    for field, value in train.items():
        setattr(cfg.train, field, value)
    return cfg


def curve(folder: Path, name: str = "lm loss") -> list[float]:
    return [step[name] for step in read_metrics(folder / "metrics.jsonl")]


def write_dataset(prefix: Path, vocab_size: int, num_documents: int = 40) -> None:
    """Documents in which the next token follows from the last one."""
    writer = IndexedWriter(str(prefix), np.dtype(np.uint16))
    rng = np.random.default_rng(len(prefix.name))
    for _ in range(num_documents):
        start, length = rng.integers(vocab_size), rng.integers(100, 300)
        tokens = (start + 7 * np.arange(length)) % vocab_size
        writer.write(tokens, np.array([length]))
    writer.close()


def test_the_script_of_a_megatron_bridge_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from megatron_mtp.recipes.qwen.qwen3_moe import qwen3_30b_a3b_pretrain_config
    from megatron_mtp.training.config import ConfigContainer as TheirContainer
    from megatron_mtp.training.gpt_step import forward_step

    for i in range(1, 11):
        write_dataset(tmp_path / f"dclm_{i:02d}_text_document", 128)
    monkeypatch.chdir(tmp_path)
    log_dir = str(tmp_path / "logs")

    cfg: TheirContainer = qwen3_30b_a3b_pretrain_config()
    cfg.logger.tensorboard_dir = log_dir + "/tb_logs"
    cfg.checkpoint.save = log_dir + "/checkpoints"
    cfg.checkpoint.load = log_dir + "/checkpoints"
    cfg.dataset.blend = [[f"dclm_{i:02d}_text_document" for i in range(1, 11)], None]
    cfg.dataset.split = "9999,8,2"
    cfg.dataset.path_to_cache = str(tmp_path / "cache")
    cfg.model.num_layers = 8
    cfg.model.mtp_num_layers = 1
    cfg.model.mtp_loss_scaling_factor = 0.1
    # Width, parallel sizes and iterations of one CPU rank.
    cfg.dataset.split = "8,1,1"
    cfg.model.seq_length, cfg.model.vocab_size = 32, 128
    cfg.model.hidden_size, cfg.model.ffn_hidden_size, cfg.model.moe_ffn_hidden_size = 32, 64, 16
    cfg.model.num_attention_heads, cfg.model.num_query_groups, cfg.model.kv_channels = 4, 2, 8
    cfg.model.num_moe_experts, cfg.model.moe_router_topk = 4, 2
    cfg.model.moe_grouped_gemm = False
    cfg.model.tensor_model_parallel_size = cfg.model.pipeline_model_parallel_size = 1
    cfg.model.expert_model_parallel_size = cfg.model.context_parallel_size = 1
    cfg.model.sequence_parallel = False
    cfg.train.train_iters, cfg.train.global_batch_size, cfg.train.micro_batch_size = 6, 4, 2
    cfg.scheduler.lr_warmup_iters, cfg.optimizer.lr = 0, 3e-3
    cfg.validation.eval_interval, cfg.validation.eval_iters = None, 1
    cfg.precision.dtype, cfg.dist.device, cfg.dist.num_threads = "fp32", "cpu", 1
    cfg.logger.log_dir = log_dir
    summary = pretrain(cfg, forward_step)

    assert summary.state.iteration == 6
    assert curve(Path(log_dir))[-1] < curve(Path(log_dir))[0]
    assert len(summary.evaluations["valid"].losses) == 2
    assert list(Path(log_dir, "tb_logs").rglob("events*"))
    assert list(Path(log_dir, "checkpoints").glob("iter_*"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 2e-2), pytest.param("fp16", 5e-3, marks=pytest.mark.slow)])
def test_half_precision_follows_fp32(tmp_path: Path, dtype: str, tolerance: float):
    curves = {}
    for name in ("fp32", dtype):
        cfg = tiny(tmp_path / name, train_iters=50)
        cfg.precision.dtype = name
        cfg.validation.eval_iters = 0
        summary = pretrain(cfg)
        curves[name] = curve(tmp_path / name)
    assert max(abs(a - b) for a, b in zip(curves["fp32"], curves[dtype], strict=True)) <= tolerance
    assert summary.state.skipped_iterations == 0
    assert curves[dtype][-1] < curves[dtype][0] - 0.5


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path):
    whole = tiny(tmp_path / "whole", "tiny_moe", train_iters=6)
    whole.validation.eval_iters = 0
    pretrain(whole)
    for end in (3, 6):
        cfg = tiny(tmp_path / "parts", "tiny_moe", train_iters=6)
        cfg.validation.eval_iters = 0
        cfg.checkpoint.save = cfg.checkpoint.load = str(tmp_path / "checkpoints")
        cfg.train.exit_interval = end
        assert pretrain(cfg).state.iteration == end
    for name in ("lm loss", "mtp_1 loss", "mtp_2 loss", "grad-norm", "learning-rate", "mtp_1/accepted"):
        assert curve(tmp_path / "whole", name) == curve(tmp_path / "parts", name)


def test_without_mtp_it_is_the_plain_model(tmp_path: Path):
    first = {}
    for depths in (0, None, 2):
        cfg = tiny(tmp_path / str(depths), train_iters=2)
        cfg.model.mtp_num_layers = depths
        cfg.validation.eval_iters = 1
        pretrain(cfg)
        steps = read_metrics(tmp_path / str(depths) / "metrics.jsonl")
        first[depths] = steps[0]["lm loss"]
        assert ("mtp_1 loss" in steps[0]) == (depths == 2)
        if not depths:
            assert not any(name.startswith("mtp") for name in steps[0])
    # The trunk's initial weights do not depend on the depths.
    assert first[0] == first[None] == pytest.approx(first[2], rel=1e-6)


def test_every_scalar_of_the_console_line_is_in_tensorboard_and_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tests.observe.wandb_file import read_history

    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = tiny(tmp_path, "tiny_moe", train_iters=3)
    cfg.model.moe_router_load_balancing_type, cfg.model.moe_aux_loss_coeff = "seq_aux_loss", 1e-3
    cfg.logger.tensorboard_dir = str(tmp_path / "tb")
    cfg.logger.wandb_project, cfg.logger.wandb_exp_name, cfg.logger.wandb_mode = "p", "run", "offline"
    cfg.logger.wandb_save_dir = str(tmp_path / "wandb")
    cfg.validation.eval_iters = 1
    summary = pretrain(cfg)

    line = next(line for line in capsys.readouterr().out.splitlines() if "iteration" in line and "lm loss" in line)
    labels = [part.split(":")[0].strip() for part in line.split("|") if ":" in part]
    order = ["consumed samples", "elapsed time per iteration (ms)", "learning rate", "global batch size", "lm loss",
             "load_balancing_loss", "mtp_1 loss", "mtp_2 loss", "loss scale", "grad norm",
             "number of skipped iterations", "number of nan iterations"]  # fmt: skip
    assert [label for label in labels if label in order] == order

    events = EventAccumulator(str(next((tmp_path / "tb").rglob("events*")).parent))
    events.Reload()
    steps = read_metrics(tmp_path / "metrics.jsonl")
    rows = read_history(tmp_path / "wandb", summary.state.wandb_run_id)
    last = [row for row in rows if "consumed-samples" in row][-1]
    names = [name for name in steps[-1] if name not in ("kind", "iteration", "time")]
    assert {"lm loss", "load_balancing_loss", "mtp_1 loss", "mtp_2 loss", "grad-norm", "learning-rate"} <= set(names)
    for name in names:
        assert math.isclose(events.Scalars(name)[-1].value, steps[-1][name], rel_tol=1e-6, abs_tol=1e-12)
        assert math.isclose(last[name], steps[-1][name], rel_tol=1e-6, abs_tol=1e-12)


def test_a_used_directory_is_not_continued_by_accident(tmp_path: Path):
    cfg = tiny(tmp_path, train_iters=1)
    cfg.validation.eval_iters = 0
    cfg.checkpoint.save = str(tmp_path / "checkpoints")
    pretrain(cfg)
    with pytest.raises(CheckpointError, match="fresh start"):
        pretrain(cfg)
    cfg.checkpoint.load = cfg.checkpoint.save
    cfg.model.hidden_size = 128
    with pytest.raises(CheckpointError, match=r"model\.hidden_size"):
        pretrain(cfg)


def test_a_token_beyond_the_vocabulary_is_named(tmp_path: Path):
    write_dataset(tmp_path / "train_text_document", 600)
    cfg = tiny(tmp_path, train_iters=2)
    cfg.dataset.mock, cfg.dataset.blend, cfg.dataset.split = False, [str(tmp_path / "train_text_document")], "1,0,0"
    cfg.dataset.path_to_cache = str(tmp_path / "cache")
    cfg.validation.eval_iters = 0
    with pytest.raises(DataError, match="outside the vocabulary of 512"):
        pretrain(cfg)
