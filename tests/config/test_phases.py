"""What a phase may change, how phases are written and merged, and where they begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.coerce import field_types
from megatron_mtp.config.knob import phase_rule
from megatron_mtp.config.overrides import apply_overrides, apply_yaml
from megatron_mtp.config.phase_configs import phase_configs
from megatron_mtp.config.schedules import BatchSchedule
from megatron_mtp.config.sections import section_types
from megatron_mtp.config.timeline import Position, ScheduleClock, Timeline
from megatron_mtp.errors import ConfigError
from megatron_mtp.parallel.resolve import resolve, resolve_phase
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit
FIELDS = [(section, name) for section, kind in section_types().items() for name in field_types(kind)]


def with_phases(*overrides: str, recipe: str = "tiny_dense") -> ConfigContainer:
    cfg = get_recipe(recipe)
    apply_overrides(cfg, list(overrides))
    return cfg


def refusals(cfg: ConfigContainer) -> list[Any]:
    with pytest.raises(ConfigError) as caught:
        cfg.finalize()
    return caught.value.problems


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_each_field_that_a_phase_may_not_set_is_refused_by_name(section: str, name: str):
    """With the value that it has: nothing else can be wrong with it."""
    cfg = get_recipe("tiny_mla_moe").finalize().copy()
    cfg.phases = {"later": {"start_iters": 5, section: {name: getattr(getattr(cfg, section), name)}}}
    if phase_rule(section_types()[section], name) != "fixed":
        cfg.finalize()
        return
    (found,) = refusals(cfg)
    assert found.fields == (f"phases.later.{section}.{name}", f"{section}.{name}")
    assert found.rule in ("cannot change within a run", "is set once for the whole run, and not in a phase")
    assert "docs/phases.md" in found.remedy


def test_what_may_change_is_what_the_model_and_its_optimizer_allow():
    """Every field that gives weights and optimizer their shapes is fixed; so is what belongs to the process."""
    fixed = {f"{s}.{n}" for s, n in FIELDS if phase_rule(section_types()[s], n) == "fixed"}
    for name in (
        "num_layers",
        "hidden_size",
        "vocab_size",
        "num_moe_experts",
        "moe_router_topk",
        "mtp_variant",
        "mcore",
    ):
        assert f"model.{name}" in fixed
    assert {"optimizer.optimizer", "ddp.use_distributed_optimizer", "precision.dtype", "rng.seed"} <= fixed
    for section in ("tokenizer", "logger", "rng", "precision", "profiling"):
        assert {f"{s}.{n}" for s, n in FIELDS if s == section} <= fixed
    assert not {f"scheduler.{n}" for n in field_types(section_types()["scheduler"])} & fixed


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        (["phases.a.model.seq_length=128"], "phases.a", "must say once where it begins"),
        (["phases.a={start_iters: 5, start_tokens: 1B}"], "phases.a", "start_iters = 5 and start_tokens = '1B'"),
        (["phases.a.start_iters=0"], "phases.a.start_iters", "must be at least 1"),
        (["phases.a.start_tokens=soon"], "phases.a.start_tokens", "must be a whole number"),
        (["phases.a.start_iters=2.5"], "phases.a.start_iters", "must be a whole number"),
        (["phases.a.start_iters=5", "phases.a.modelx.seq_length=1"], "phases.a.modelx", "Did you mean model?"),
        (["phases.a.start_iters=5", "phases.a.model.seq_lenth=1"], "phases.a", "Did you mean model.seq_length?"),
        (["phases.base.start_iters=5"], "phases.base", "the part before the first phase"),
        (["phases.a=7"], "phases.a", "must be a mapping"),
        (["phases=[1]"], "phases", "must be a mapping of names to phases"),
        (["phases.a.start_iters=5", "checkpoint.enter_phase=b"], "checkpoint.enter_phase", "Phases: a."),
        (["phases.a.start_iters=5", "phases.b.start_iters=5"], "phases.b.start_iters", "where phases.a begins"),
        (["phases.a.start_iters=9", "phases.b.start_samples=64"], "phases.b.start_samples", "where phases.a begins"),
        (["phases.a.start_iters=5", "checkpoint.save_optim=false"], "checkpoint.save_optim", "optimizer included"),
    ],
)
def test_mistakes_are_named(overrides: list[str], field: str, words: str):
    with pytest.raises(ConfigError) as caught:
        with_phases(*overrides).finalize()
    assert [problem.fields[0] for problem in caught.value.problems] == [field]
    assert words in str(caught.value)


def test_a_phase_is_checked_like_a_run_and_each_mistake_is_named_once():
    cfg = with_phases(
        "phases.a.start_iters=5",
        "phases.a.model.seq_length=63",
        "phases.a.model.context_parallel_size=2",
        "phases.b.start_iters=9",
        "phases.b.optimizer.lr=-1",
    )
    found = refusals(cfg)
    assert [(one.where, one.fields[0]) for one in found] == [
        ("phases.a", "model.seq_length"),
        ("phases.b", "optimizer.lr"),
    ]


def test_the_number_of_processes_must_suit_each_phase():
    cfg = with_phases("phases.a.start_iters=5", "phases.a.model.tensor_model_parallel_size=4")
    cfg.copy().finalize(4)
    with pytest.raises(ConfigError, match=r"phases\.a: "):
        cfg.finalize(2)


def test_files_and_arguments_are_merged_phase_by_phase(tmp_path: Path):
    cfg = with_phases("phases.a.start_iters=5", "phases.a.model.seq_length=32", "phases.b.start_iters=9")
    file = tmp_path / "more.yaml"
    file.write_text("phases:\n  a: {start_tokens: 10K, train: {global_batch_size: 16}}\n  b: null\n")
    apply_yaml(cfg, file)
    assert cfg.phases == {"a": {"start_tokens": "10K", "model": {"seq_length": 32}, "train": {"global_batch_size": 16}}}
    assert ConfigContainer.from_yaml(cfg.finalize().to_yaml()) == cfg
    for clear in ("phases=null", "phases.a=null"):
        apply_overrides(again := cfg.copy(), [clear])
        assert again.phases == {}
    with pytest.raises(ConfigError, match="finalized"):
        cfg.phases["a"]["start_tokens"] = 1


def test_derived_values_follow_and_those_that_are_set_stay():
    cfg = with_phases(
        "train.global_batch_size=8",
        "validation.eval_global_batch_size=4",
        "phases.a.start_iters=5",
        "phases.a.model.seq_length=32",
        "phases.a.train.micro_batch_size=4",
        "phases.b.start_iters=9",
        "phases.b.train.global_batch_size=16",
    ).finalize()
    (_, a), (_, b) = phase_configs(cfg)
    assert (a.dataset.seq_length, a.validation.eval_micro_batch_size) == (32, 4)
    assert (b.dataset.seq_length, b.validation.eval_global_batch_size) == (32, 4)
    assert b.train.micro_batch_size == 4


# ---- where phases begin ----
def walk(cfg: ConfigContainer) -> tuple[list[Position], list[Position]]:
    """The positions at the end of each step, and where phases begin, by going through the run step by step."""
    phases, now, ramp_from = [(None, cfg), *phase_configs(cfg)], Position(), 0
    present, ends, starts = 0, [now], [now]
    while now.iteration < cfg.train.train_iters:
        while present + 1 < len(phases):
            start = phases[present + 1][0].start
            if not start.is_reached(now.iteration, now.samples, now.tokens):
                break
            present += 1
            starts.append(now)
            ramp_from = now.samples if phases[present][0].begins("batch") else ramp_from
        own = phases[present][1]
        size = BatchSchedule.of(own.train).size_at(now.samples - ramp_from)
        samples = now.samples + size
        now = Position(now.iteration + 1, samples, now.tokens + size * own.model.seq_length, samples)
        ends.append(now)
    return ends, starts


@st.composite
def runs(draw: st.DrawFn) -> ConfigContainer:
    cfg = get_recipe("tiny_dense")
    cfg.train.update(train_iters=60, global_batch_size=8, micro_batch_size=1)
    cfg.scheduler.lr_warmup_iters = draw(st.sampled_from([0, 7, 20]))
    if draw(st.booleans()):
        cfg.train.rampup_batch_size = [2, 2, draw(st.integers(20, 200))]
    place = 0
    for name in draw(st.sampled_from(["", "a", "ab", "abc"])):
        place += draw(st.integers(1, 15))
        count = {"start_iters": place, "start_samples": 8 * place + 3, "start_tokens": 8 * 64 * place + 5}
        key = draw(st.sampled_from(list(count)))
        phase: dict[str, Any] = {key: count[key]}
        if draw(st.booleans()):
            phase["model"] = {"seq_length": draw(st.sampled_from([32, 64, 96, 256]))}
        if draw(st.booleans()):
            phase["train"] = {"global_batch_size": draw(st.sampled_from([4, 8, 10])), "rampup_batch_size": None}
        if draw(st.integers(0, 3)) == 0:
            phase["scheduler"] = {"lr_decay_style": "linear", "lr_warmup_iters": 0}
        cfg.phases[name] = phase
    return cfg


@settings(max_examples=60, deadline=None)
@given(runs())
def test_the_timeline_is_a_walk_through_the_run(cfg: ConfigContainer):
    try:
        cfg.finalize()
    except ConfigError:  # two phases begin at one step
        assume(False)
    ends, starts = walk(cfg)
    timeline = Timeline.of(cfg)
    assert [phase.start for phase in timeline.phases][: len(starts)] == starts
    assert all(phase.start.iteration >= 60 for phase in timeline.phases[len(starts) :])
    for end in ends:
        assert timeline.samples_at_iteration(end.iteration) == end.samples
        assert timeline.iteration_at(end.samples) == end.iteration
        assert timeline.tokens_at(end.samples) == end.tokens
        assert timeline.samples_at_tokens(end.tokens) == end.samples
    assert timeline.end_samples() == ends[-1].samples
    # A schedule over the whole run reaches its floor with the last step, whatever the phases do.
    last = max(phase.schedule_from for phase in timeline.phases[: len(starts)])
    own = resolve_phase(timeline, last)
    assert own.learning_rate.decay == ScheduleClock(timeline, last).at(ends[-1].samples, ends[-1].tokens)
    assert own.learning_rate(own.learning_rate.decay) == pytest.approx(cfg.optimizer.min_lr)
    # What has begun is known: the rest of the timeline does not depend on how far the run is.
    for count in range(len(starts)):
        begun = [(phase.name, phase.start) for phase in timeline.phases[1 : count + 1]]
        assert Timeline.of(cfg, begun) == timeline


def test_a_phase_that_sets_no_schedule_goes_on_in_the_one_before():
    cfg = with_phases(
        "train.train_iters=40",
        "phases.a.start_iters=10",
        "phases.a.model.seq_length=256",
        "phases.b.start_iters=20",
        "phases.b.optimizer.lr=1e-4",
        "phases.b.optimizer.min_lr=0",
        "phases.b.scheduler.lr_warmup_iters=0",
        "phases.b.scheduler.lr_decay_style=linear",
        recipe="tiny_dense",
    ).finalize()
    timeline = Timeline.of(cfg)
    base, a, b = (resolve_phase(timeline, index) for index in range(3))
    at = [timeline.tokens_at(timeline.samples_at_iteration(step)) for step in range(41)]
    samples = [timeline.samples_at_iteration(step) for step in range(41)]
    assert a.learning_rate == base.learning_rate
    assert a.clock.at(samples[15], at[15]) == 8 * 10 + 4 * 8 * 5, "in samples of 64 tokens"
    rates = [b.learning_rate(b.clock.at(samples[step], at[step])) for step in (20, 30, 40)]
    assert rates == pytest.approx([1e-4, 5e-5, 0])


def test_a_run_without_phases_has_one_phase_whose_clock_is_samples():
    run = resolve(with_phases("train.train_iters=40").finalize())
    assert [phase.name for phase in run.timeline.phases] == ["base"]
    assert run.clock.at(24, 1) == 24
    assert (run.data_start, run.batch_start, run.phase.begins) == (0, 0, None)


def test_which_phase_a_run_goes_on_in():
    cfg = with_phases("train.train_iters=40", "phases.a.start_iters=10", "phases.b.start_iters=20").finalize()

    def present(iteration: int, *begun: str, enter: str | None = None, may_begin: bool = True) -> str:
        chosen = cfg.copy()
        chosen.checkpoint.enter_phase = enter
        places = [(name, Position(iteration, 8 * iteration, 512 * iteration, 8 * iteration)) for name in begun]
        timeline = Timeline.of(chosen.finalize(), places)
        at = Position(iteration, 8 * iteration, 512 * iteration, 8 * iteration)
        return timeline.phases[timeline.present(at, begun, may_begin=may_begin)].name

    assert [present(step) for step in (0, 9, 10, 19, 20, 39)] == ["base", "base", "a", "a", "b", "b"]
    assert present(10, may_begin=False) == "base"
    assert present(5, "a") == "a", "it was entered by name before its start"
    assert [present(5, enter="a"), present(5, enter="b"), present(5, "b", enter="a")] == ["a", "b", "b"]
