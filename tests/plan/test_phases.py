"""`plan` and `show` of a run with phases, and the published phases of DeepSeek-V3."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from megatron_mtp.cli.choose import phase_of
from megatron_mtp.cli.main import main
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.timeline import ScheduleClock, Timeline
from megatron_mtp.errors import ConfigError
from megatron_mtp.parallel.resolve import resolve_phase
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit
PHASES = (
    "train.train_iters=40",
    "phases.long.start_iters=20",
    "phases.long.model.seq_length=256",
    "phases.long.model.context_parallel_size=2",
    "phases.batch.start_iters=30",
    "phases.batch.train.global_batch_size=16",
)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    found = capsys.readouterr()
    assert not left.value.code, found.err
    return found.out


def test_each_phase_is_planned(capsys: pytest.CaptureFixture[str]):
    options = ("plan", "tiny_dense", *PHASES, "--devices", "2", "--hardware", "h100")
    data = json.loads(printed(capsys, *options, "--json"))
    assert [(one["name"], one["iteration"], one["steps"]) for one in data["phases"]] == [
        ("base", 0, 20),
        ("long", 20, 10),
        ("batch", 30, 10),
    ]
    assert [one["tokens"] for one in data["phases"]] == [20 * 8 * 64, 10 * 8 * 256, 10 * 16 * 256]
    base, long, batch = (one["plan"] for one in data["phases"])
    assert base == data["plan"]
    assert long["step_ms"] > base["step_ms"]
    assert batch["num_microbatches"] == 2 * long["num_microbatches"]
    alone = json.loads(printed(capsys, *options[:2], *options[8:], "--json", *flat_config("batch")))
    assert alone["plan"] == batch, "a phase is planned as a run with its config"
    text = printed(capsys, *options)
    assert "phase long, from step 20 on:" in text
    last = [line.split() for line in text.splitlines()[-4:]]
    assert [line[0] for line in last] == ["base", "long", "batch", "all"]
    assert last[3][1] == "40"


def flat_config(name: str) -> list[str]:
    """What `PHASES` says of one phase, without phases."""
    cfg = get_recipe("tiny_dense")
    from megatron_mtp.config.overrides import apply_overrides

    apply_overrides(cfg, list(PHASES))
    found = phase_of(cfg, name).model
    return [
        f"model.seq_length={found.seq_length}",
        f"model.context_parallel_size={found.context_parallel_size}",
        "train.global_batch_size=16",
    ]


def test_a_phase_that_does_not_fit_is_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["plan", "tiny_dense", *PHASES, "phases.long.model.seq_length=16384", "--devices", "2", "--memory", "0.2"])
    assert left.value.code == 2
    assert "phases.long: model.pipeline_model_parallel_layout" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--search"], ["--tokens", "1B"]], ids=str)
def test_what_is_about_one_config_is_refused(option: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["plan", "tiny_dense", *PHASES, *option, "--devices", "2"])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert option[0] in error
    assert "Add phases=null" in error


def test_show_prints_a_config_that_can_be_used_again(capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "show", "tiny_dense", *PHASES, "checkpoint.save=runs/x")
    again = ConfigContainer.from_dict(yaml.safe_load(text))
    assert list(again.phases) == ["long", "batch"]
    assert again.phases["long"] == {"start_iters": 20, "model": {"seq_length": 256, "context_parallel_size": 2}}
    assert "phase long begins: model.seq_length 256, model.context_parallel_size 2" in text.replace(
        "\n#             ", " "
    )
    assert "batch: 16 samples of 256 tokens, cp 2" in text.replace("\n#             ", " ")
    data = json.loads(printed(capsys, "show", "tiny_dense", *PHASES, "--json"))
    assert [(one["name"], one["iteration"]) for one in data["phases"]] == [("long", 20), ("batch", 30)]
    assert any("the run is refused" in hint for hint in data["hints"])
    cut = json.loads(printed(capsys, "show", "tiny_dense", *PHASES, "train.train_iters=30", "--json"))
    assert any("phases.batch: the run ends before it begins" in hint for hint in cut["hints"])


def test_a_phase_can_be_chosen_for_verify():
    cfg = get_recipe("deepseek_v3_whole")
    assert phase_of(cfg.copy(), None).phases == {}
    assert phase_of(cfg.copy(), "context_32k").model.seq_length == 32768
    with pytest.raises(ConfigError, match="Did you mean context_32k"):
        phase_of(cfg, "context_33k")


def test_the_published_phases_of_deepseek_v3():
    """arXiv 2412.19437, sections 4.2 and 4.3."""
    cfg = get_recipe("deepseek_v3_whole").finalize(1024)
    timeline = Timeline.of(cfg)
    runs = [resolve_phase(timeline, index, 1024) for index in range(len(timeline.phases))]
    found: dict[str, Any] = {run.phase.name: run for run in runs}
    step = 15360 * 4096
    for name, tokens in [("balanced", 14.3e12), ("last", 14.633e12), ("context_32k", 14.8e12)]:
        assert 0 <= found[name].phase.start.tokens - tokens < step
    assert found["context_128k"].phase.start.iteration - found["context_32k"].phase.start.iteration == 1000
    end = timeline.iteration_at(timeline.end_samples())
    assert end - found["context_128k"].phase.start.iteration == 1000

    def rate(name: str, tokens: float) -> float:
        samples = timeline.samples_at_tokens(tokens)
        return found[name].learning_rate(found[name].clock.at(samples, timeline.tokens_at(samples)))

    assert rate("base", 5e12) == 2.2e-4
    assert rate("base", 14.3e12 + step) == rate("balanced", 14.6e12) == 2.2e-5
    assert {rate(name, tokens) for name, tokens in [("last", 14.7e12), ("context_128k", 14.9e12)]} == {7.3e-6}
    factors = [found[name].loss_factor.at(int(tokens)) for name, tokens in [("base", 9e12), ("context_32k", 14.81e12)]]
    assert factors == [0.3, 0.1]
    assert [run.cfg.model.moe_router_bias_update_rate for run in runs] == [1e-3, 0, 0, 0, 0]
    sizes = [(run.cfg.model.seq_length, run.cfg.train.global_batch_size, run.cfg.model.rope_type) for run in runs[-2:]]
    assert sizes == [(32768, 1920, "yarn"), (131072, 480, "yarn")]
    assert timeline.phases[3].data_from == 3
    assert ScheduleClock(timeline, 2).start == runs[-1].phase.schedule_from
