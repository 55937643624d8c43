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
        "model.mtp_num_layers",
        "model.mtp_variant",
        "model.mtp_use_repeated_layer",
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
    comparison = compare({path: "other"})
    assert len(comparison.refusals) == 1
    assert comparison.refusals[0].startswith(f"{path} = 'other': the checkpoint was saved with ")
    assert not comparison.changes


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
    del saved["model"]["mtp_variant"]
    assert compat.compare(saved, present, DEFAULTS).refusals == []
    present["model"]["mtp_variant"] = "parallel"
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


@pytest.mark.parametrize(
    ("saved", "present", "fits"),
    [
        ((1, False), (3, True), True),  # a drafter of three steps from a first depth
        ((3, True), (1, False), True),
        ((3, True), (2, True), True),
        ((2, False), (2, True), False),  # which of the two?
        ((1, False), (2, False), False),
        ((0, False), (1, True), False),
    ],
)
def test_one_mtp_layer_may_become_a_repeated_one(saved, present, fits):
    names = ("mtp_num_layers", "mtp_use_repeated_layer")
    refusals = weight_refusals(dict(zip(names, saved, strict=True)), dict(zip(names, present, strict=True)))
    assert (not refusals) == fits
    assert fits or any("makes new MTP layers" in text for text in refusals) or "mtp_use_repeated_layer" in refusals[0]
