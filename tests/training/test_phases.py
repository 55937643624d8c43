"""A run with phases: it goes from one to the next by itself, and is the run that was stopped or killed anywhere."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_mtp import ConfigContainer, pretrain
from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.checkpoint.train_state import TrainState, read_train_state
from megatron_mtp.cli.main import main
from megatron_mtp.errors import CheckpointError, ConfigError, DataError
from megatron_mtp.mcore.optimizer import single_optimizers
from megatron_mtp.model.sharded import unwrap
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.recipes import get_recipe
from megatron_mtp.training.callbacks import Callback
from megatron_mtp.training.gpt_step import forward_step
from tests.data.corpora import write_corpus

pytestmark = pytest.mark.dist
STEPS = 10
TIMED = ("time", "perf/", "checkpoint/")
"""Metrics that measure time; they differ from run to run."""
PHASES: dict[str, dict[str, Any]] = {
    "mix": {"start_iters": 3, "model": {"mtp_loss_scaling_factor": 0.3}},
    "long": {
        "start_iters": 5,
        "model": {"seq_length": 256, "rope_type": "yarn", "rotary_scaling_factor": 4.0, "mscale_all_dim": 1.0},
    },
    "batch": {"start_iters": 7, "train": {"global_batch_size": 8, "micro_batch_size": 2}},
    "deeper": {"start_iters": 8, "model": {"mtp_num_layers": 2, "mtp_new_layers_init": "last_depth"}},
}


def config(folder: Path, name: str) -> ConfigContainer:
    """A small model on two corpora; its run is called `name`."""
    for corpus in ("a", "b"):
        if not (folder / f"{corpus}.idx").exists():
            write_corpus(str(folder / corpus), [120] * 80, seed=ord(corpus))
    cfg = get_recipe("tiny_mla_moe")
    cfg.model.update(num_layers=2, moe_layer_freq=[0, 1], hidden_size=32, ffn_hidden_size=64, num_moe_experts=4)
    cfg.model.update(moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=32, vocab_size=128, seq_length=64)
    cfg.model.update(original_max_position_embeddings=64, hidden_dropout=0.1, mtp_num_layers=1)
    cfg.model.update(moe_router_num_groups=None, moe_router_group_topk=None)
    cfg.tokenizer.vocab_size = 100
    cfg.train.update(train_iters=STEPS, global_batch_size=4, micro_batch_size=1)
    cfg.optimizer.update(lr=1e-2, min_lr=1e-3)
    cfg.scheduler.lr_warmup_iters = 2
    cfg.dist.update(device="cpu", num_threads=1)
    cfg.dataset.update(blend=[str(folder / "a")], split="8,1,1", path_to_cache=str(folder / "cache"))
    cfg.validation.update(eval_iters=2, eval_interval=5, eval_at_end=False)
    cfg.checkpoint.save = cfg.checkpoint.load = str(folder / name)
    cfg.logger.log_dir = str(folder / f"{name}_log")
    cfg.phases = deepcopy(PHASES)
    cfg.phases["mix"]["dataset"] = {"blend": [[str(folder / corpus) for corpus in "ab"], [1, 3]]}
    return cfg


def curves(cfg: ConfigContainer, kind: str = "step") -> list[dict[str, Any]]:
    """Every metric that is no time, at each step."""
    records = read_metrics(Path(cfg.logger.log_dir) / "metrics.jsonl", kind)
    return [{name: value for name, value in one.items() if not name.startswith(TIMED)} for one in records]


def state_of(cfg: ConfigContainer, iteration: int) -> TrainState:
    directory = RunDirectory(cfg.checkpoint.save)
    manifest = directory.read(iteration)
    return TrainState.from_dict(read_train_state(directory.final_path(iteration), manifest)[0])


def files_of(cfg: ConfigContainer, iteration: int) -> dict[str, str]:
    """Weights, optimizer and random numbers: the checksums of their files."""
    files = RunDirectory(cfg.checkpoint.save).read(iteration).files
    return {one.name: one.sha256 for one in files if one.name.endswith(".distcp")}


class Models(Callback):
    """Keeps the parts of every phase's run, and looks at their memory where the next one begins."""

    def __init__(self) -> None:
        self.kept: list[list[Any]] = []
        self.bytes: list[int] = []

    def on_train_start(self, run: Any, state: TrainState) -> None:
        for tensors in self.kept[-1:]:
            self.bytes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        model, optimizers = unwrap(run.engine.chunks[0]), single_optimizers(run.engine.optimizer)
        found = [*model.parameters(), *model.buffers(), *(parameter.main_grad for parameter in model.parameters())]
        states = [state for optimizer in optimizers for state in optimizer.optimizer.state.values()]
        self.kept.append(found + [value for state in states for value in state.values() if isinstance(value, Tensor)])


MODELS = Models()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ConfigContainer:
    """A run that went through all phases by itself."""
    cfg = config(tmp_path_factory.mktemp("phases"), "whole")
    pretrain(cfg, callbacks=[MODELS])
    return cfg


def test_a_run_that_is_stopped_at_each_border_and_between_them_is_the_run_that_was_not(whole: ConfigContainer):
    for end in (3, 4, 5, 7, 8, STEPS):
        cfg = config(Path(whole.checkpoint.save).parent, "parts")
        cfg.train.exit_interval = end
        assert pretrain(cfg).state.iteration == end
    assert curves(cfg) == curves(whole)
    assert len(curves(cfg)) == STEPS
    assert curves(cfg, "evaluation") == curves(whole, "evaluation")
    assert files_of(cfg, STEPS) == files_of(whole, STEPS)
    assert state_of(cfg, STEPS).phases == state_of(whole, STEPS).phases


def test_counters_schedule_and_history(whole: ConfigContainer):
    steps = curves(whole)
    assert [step["batch-size"] for step in steps] == [4] * 7 + [8] * 3
    assert [step["consumed-samples"] for step in steps] == [4, 8, 12, 16, 20, 24, 28, 36, 44, 52]
    lengths = [64] * 5 + [256] * 5
    tokens = [sum(4 * (2 if i >= 7 else 1) * lengths[i] for i in range(n + 1)) for n in range(STEPS)]
    assert [step["consumed-tokens"] for step in steps] == tokens
    assert [step["mtp/loss_scaling_factor"] for step in steps] == [0.1] * 3 + [0.3] * 7
    assert ["mtp_2 loss" in step for step in steps] == [False] * 8 + [True] * 2
    # One cosine over the tokens of the whole run, after a warmup of two steps.
    for before, step in zip([0, *tokens], steps, strict=False):
        share = (before - 512) / (tokens[-1] - 512)
        cosine = 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * share))
        assert step["learning-rate"] == pytest.approx(1e-2 * before / 512 if before < 512 else cosine)
    history = state_of(whole, STEPS).phases
    assert [(one["name"], one["iteration"], one["samples"], one["tokens"]) for one in history] == [
        ("mix", 3, 12, 768),
        ("long", 5, 20, 1280),
        ("batch", 7, 28, 3328),
        ("deeper", 8, 36, 5376),
    ]
    assert history[1]["changes"]["model.seq_length"] == [64, 256]
    lines = curves(whole, "phase")
    assert [one["iteration"] for one in lines] == [3, 5, 7, 8]
    assert lines[2]["text"] == (
        "phase batch begins after iteration 7, 3,328 tokens: train.global_batch_size 4 -> 8, "
        "train.micro_batch_size 1 -> 2"
    )


def test_the_memory_of_a_phase_is_given_back_before_the_next_one_trains(whole: ConfigContainer):
    assert [len(kept) > 100 for kept in MODELS.kept] == [True] * 5
    assert MODELS.bytes == [0] * 4


def test_a_checkpoint_of_a_phase_holds_the_config_of_the_phase(whole: ConfigContainer):
    directory = RunDirectory(whole.checkpoint.save)
    assert directory.iterations() == [10, 8, 7, 5, 3]
    saved = ConfigContainer.from_yaml(directory.final_path(7) / "config.yaml")
    assert (saved.model.seq_length, saved.model.rope_type, saved.train.global_batch_size) == (256, "yarn", 4)
    assert saved.phases == {}
    assert directory.read(7).reason == "end of phase long"


def test_checkpoint_show_lists_the_phases(whole: ConfigContainer, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["checkpoint", "show", f"{whole.checkpoint.save}@{STEPS}"])
    begun = "mix from iteration 3, long from iteration 5, batch from iteration 7, deeper from iteration 8"
    assert f"phases      {begun}" in capsys.readouterr().out


def test_a_run_gets_phases_late_and_enters_one_by_name(tmp_path: Path):
    """A run without phases, then with `mix` and `long`, of which `mix` is left out, though what it sets counts."""
    cfg = config(tmp_path, "late")
    phases, cfg.phases = cfg.phases, {}
    cfg.train.exit_interval = 2
    pretrain(cfg)
    cfg = config(tmp_path, "late")
    cfg.phases = {name: phases[name] for name in ("mix", "long")}
    cfg.checkpoint.enter_phase = "long"
    cfg.train.exit_interval = 4
    state = pretrain(cfg).state
    assert [(one["name"], one["iteration"]) for one in state.phases] == [("long", 2)]
    assert state.consumed_tokens == 2 * 4 * 64 + 2 * 4 * 256
    assert list(state.phases[0]["changes"])[:2] == ["model.mtp_loss_scaling_factor", "dataset.blend"]
    assert curves(cfg)[2]["mtp/loss_scaling_factor"] == 0.3
    # A restart with the same config goes on in it, and so does one that no longer names it.
    for name, end in (("long", 5), (None, 6)):
        cfg = config(tmp_path, "late")
        cfg.phases = {name: phases[name] for name in ("mix", "long")}
        cfg.checkpoint.enter_phase, cfg.train.exit_interval = name, end
        assert pretrain(cfg).state.phases == state.phases
    cfg = config(tmp_path, "late")
    cfg.phases = {"mix": phases["mix"]}
    with pytest.raises(CheckpointError, match=r"iteration 6 has gone through long, .* the config has mix"):
        pretrain(cfg)


def test_what_a_phase_may_set_may_not_change_within_it(whole: ConfigContainer):
    cfg = config(Path(whole.checkpoint.save).parent, "whole")
    cfg.phases["long"]["model"] = cfg.phases["long"]["model"] | {"seq_length": 128}
    with pytest.raises(CheckpointError, match=r"model\.seq_length = 128: the checkpoint was saved with 256"):
        pretrain(cfg)


def test_a_phase_is_refused_before_anything_is_written(tmp_path: Path):
    cfg = config(tmp_path, "refused")
    cfg.checkpoint.save = cfg.checkpoint.load = None
    with pytest.raises(ConfigError, match=r"checkpoint\.save = None: .* it has phases: mix, long, batch, deeper"):
        pretrain(cfg)
    cfg = config(tmp_path, "refused")
    cfg.phases["long"]["model"]["seq_length"] = 100_000
    with pytest.raises(DataError, match=r"phases\.long: .*/a: its train split holds .* too few for one sample"):
        pretrain(cfg)
    assert not (tmp_path / "refused").exists()


def test_a_rollback_within_a_phase_returns_to_its_start(tmp_path: Path):
    """To the checkpoint with which it began, which knows nothing of the phase; the data goes on behind the bad step."""
    bad: list[bool] = []

    def forward(context: Any, batches: Any, model: Any) -> Any:
        output, loss = forward_step(context, batches, model)
        return (output * math.nan if bad and bad.pop() else output), loss

    class Spoiler(Callback):
        def on_step_end(self, run: Any, state: TrainState, result: Any) -> None:
            if state.iteration == 6 and not state.rollbacks:
                bad.append(True)

    cfg = config(tmp_path, "rolled")
    cfg.train.on_nan, cfg.checkpoint.save_interval = "rollback", 100
    state = pretrain(cfg, forward_step=forward, callbacks=[Spoiler()]).state
    assert (state.rollbacks, state.passed_over_samples, state.iteration) == (1, 8, STEPS)
    assert [(one["name"], one["iteration"], one["data"]) for one in state.phases] == [
        ("mix", 3, 12),
        ("long", 5, 20),
        ("batch", 7, 36),
        ("deeper", 8, 44),
    ]
