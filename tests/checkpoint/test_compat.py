"""Which config changes a resume allows, reports or refuses."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from megatron_mtp.checkpoint import compat
from megatron_mtp.config import ConfigContainer

pytestmark = pytest.mark.unit

DEFAULTS = asdict(ConfigContainer())


def compare(changes: dict[str, object], saved: dict[str, object] | None = None) -> compat.ConfigDifferences:
    """Compares a default config that has `saved` applied with one that has `changes` applied too."""
    sides = []
    for values in (saved or {}, {**(saved or {}), **changes}):
        side = asdict(ConfigContainer())
        for path, value in values.items():
            section, name = path.split(".")
            assert name in side[section], f"{path} is no field"
            side[section][name] = value
        sides.append(side)
    return compat.compare(sides[0], sides[1], DEFAULTS)


@pytest.mark.parametrize(
    "path",
    [
        "model.hidden_size",
        "model.vocab_size",
        "model.seq_length",
        "model.mtp_variant",
        "model.mtp_hidden_source",
        "model.num_moe_experts",
        "model.rotary_base",
        "model.mcore",
        "train.global_batch_size",
        "train.rampup_batch_size",
        "optimizer.optimizer",
        "ddp.use_distributed_optimizer",
        "dataset.blend",
        "dataset.split",
        "dataset.reset_attention_mask",
        "tokenizer.tokenizer_type",
        "rng.seed",
    ],
)
def test_what_cannot_change_is_refused_by_name(path):
    comparison = compare({path: "other"}, saved={"model.mtp_num_layers": 1})
    assert len(comparison.refusals) == 1
    assert comparison.refusals[0].startswith(f"{path} = 'other': the checkpoint was saved with ")
    assert not comparison.changes


@pytest.mark.parametrize("path", ["model.seq_length", "dataset.blend", "train.global_batch_size", "model.rotary_base"])
def test_what_a_phase_may_change_is_refused_with_the_way_and_may_change_where_one_begins(path):
    section = path.split(".")[0]
    way = f"A phase may change it: phases.NAME.{path} and checkpoint.enter_phase=NAME"
    assert way in compare({path: "other"}).refusals[0]
    present = {**DEFAULTS, section: {**DEFAULTS[section], path.split(".")[1]: "other"}}
    assert compat.compare(DEFAULTS, present, DEFAULTS, phase_begins=True).refusals == []
    changed = {**present, "model": {**present["model"], "num_layers": "other"}}
    assert len(compat.compare(DEFAULTS, changed, DEFAULTS, phase_begins=True).refusals) == 1


@pytest.mark.parametrize(
    "path",
    [
        "model.tensor_model_parallel_size",
        "model.pipeline_model_parallel_layout",
        "model.virtual_pipeline_model_parallel_size",
        "model.expert_model_parallel_size",
        "model.context_parallel_size",
        "train.micro_batch_size",
        "validation.eval_interval",
        "logger.log_interval",
        "checkpoint.save",
        "dataset.prefetch_steps",
        "dist.num_threads",
    ],
)
def test_what_may_change_is_not_mentioned(path):
    assert compare({path: "other"}) == compat.ConfigDifferences([], [])


@pytest.mark.parametrize(
    "path",
    ["optimizer.lr", "optimizer.clip_grad", "model.mtp_loss_scaling_factor", "train.train_iters", "precision.dtype"],
)
def test_the_remedies_for_a_bad_curve_are_allowed_and_reported(path):
    comparison = compare({path: "other"})
    assert not comparison.refusals
    assert comparison.changes == [
        f"{path} = 'other': the checkpoint was saved with {DEFAULTS[path.split('.')[0]][path.split('.')[1]]!r}."
    ]


def test_dtype_needs_the_distributed_optimizer_to_change():
    refusals = compare({"precision.dtype": "fp32"}, saved={"ddp.use_distributed_optimizer": False}).refusals
    assert len(refusals) == 1
    assert "use_distributed_optimizer=true only" in refusals[0]


def test_data_may_move_but_not_change():
    old = [["/old/a_text", "/old/b_text"], [1.0, 2.0]]
    assert (
        compare({"dataset.blend": [["/new/a_text", "x/b_text"], [1.0, 2.0]]}, saved={"dataset.blend": old}).refusals
        == []
    )
    assert compare(
        {"dataset.blend": [["/old/b_text", "/old/a_text"], [1.0, 2.0]]}, saved={"dataset.blend": old}
    ).refusals
    assert compare(
        {"dataset.blend": [["/old/a_text", "/old/b_text"], [2.0, 2.0]]}, saved={"dataset.blend": old}
    ).refusals


def test_every_refusal_is_named_at_once():
    assert len(compare({"model.hidden_size": 1, "rng.seed": 2, "dataset.split": "1,1,1"}).refusals) == 3


def test_a_vocabulary_not_yet_read_from_the_tokenizer_is_not_compared():
    saved, present = asdict(ConfigContainer()), asdict(ConfigContainer())
    saved["model"]["vocab_size"] = 512
    assert compat.compare(saved, present, DEFAULTS).refusals == []


def test_a_field_that_one_side_lacks_is_taken_at_its_default():
    saved, present = asdict(ConfigContainer()), asdict(ConfigContainer())
    del saved["model"]["qk_layernorm"]
    assert compat.compare(saved, present, DEFAULTS).refusals == []
    present["model"]["qk_layernorm"] = True
    assert len(compat.compare(saved, present, DEFAULTS).refusals) == 1


def test_a_field_this_version_does_not_know_is_refused():
    saved, present = asdict(ConfigContainer()), asdict(ConfigContainer())
    saved["model"]["hyper_connections"] = 4
    refusals = compat.compare(saved, present, DEFAULTS).refusals
    assert refusals == [
        "model.hyper_connections = nothing: the checkpoint was saved with 4. It cannot change within a run."
    ]


def test_a_trunk_is_frozen_or_freed_without_optimizer_state_only():
    refused = compare({"model.mtp_freeze_trunk": True})
    assert "It can change with checkpoint.load_optim=false only" in refused.refusals[0]
    allowed = compare({"model.mtp_freeze_trunk": True, "checkpoint.load_optim": False})
    assert not allowed.refusals
    assert allowed.changes


def weight_refusals(saved: dict[str, object], present: dict[str, object]) -> list[str]:
    """Of starting a run with `present` model fields from the weights of one with `saved` ones."""
    sides = []
    for values in (saved, present):
        side = asdict(ConfigContainer())
        side["model"] |= values
        sides.append(side)
    return compat.compare_weights(sides[0], sides[1], DEFAULTS)


NAMES = ("mtp_num_layers", "mtp_use_repeated_layer", "mtp_new_layers_init")


def depth_fields(*values: object) -> dict[str, object]:
    return dict(zip(NAMES, values, strict=False))


@pytest.mark.parametrize(
    ("saved", "present", "fits"),
    [
        ((1, False), (3, True), True),  # a drafter of three steps from a first depth
        ((3, True), (1, False), True),
        ((3, True), (2, True), True),
        ((2, False), (2, True), False),
        ((1, False), (2, False), False),
        ((0, False), (1, True), False),
    ],
)
def test_one_mtp_layer_may_become_a_repeated_one(saved, present, fits):
    refusals = weight_refusals(depth_fields(*saved), depth_fields(*present))
    assert (not refusals) == fits
    assert fits or refusals[0].startswith("model.mtp_num_layers: the weights hold ")


def in_model(*values: object) -> dict[str, object]:
    return {f"model.{name}": value for name, value in depth_fields(*values).items()}


@pytest.mark.parametrize(
    ("saved", "present", "start"),
    [
        ((1,), (2,), "model.mtp_num_layers = 2: the checkpoint holds 1 MTP layer. Say how"),
        ((0,), (1, True), "model.mtp_num_layers = 1: the checkpoint holds no MTP layers. Say how"),
        ((2, True), (2, False), "model.mtp_num_layers = 2: the checkpoint holds 1 MTP layer. Say how"),
        ((0,), (1, False, "last_depth"), "model.mtp_num_layers = 1: the checkpoint holds no MTP layers, so"),
        ((1,), (2, False, "last_depth"), None),
        ((0,), (2, False, "fresh"), None),
        ((1,), (3, True), None),
        ((3,), (1,), None),
        ((2,), (2, True), None),
    ],
)
def test_depths_are_added_by_a_stated_rule_and_dropped_with_a_report(saved, present, start):
    found = compare(in_model(*present), saved=in_model(*saved))
    assert [text for text in found.refusals if not text.startswith(str(start))] == []
    assert bool(found.refusals) == (start is not None)
    assert found.changes


def test_the_form_of_mtp_layers_is_free_where_the_checkpoint_has_none():
    form = {"model.mtp_variant": "parallel", "model.mtp_layer_mlp": "dense"}
    assert compare({**in_model(2, False, "fresh"), **form}).refusals == []
    assert len(compare({**in_model(2, False, "fresh"), **form}, saved=in_model(1)).refusals) == 2
