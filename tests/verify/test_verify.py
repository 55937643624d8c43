"""`verify`: what it reads, what it refuses, how it shrinks, and that it tells right from wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from megatron_mtp.cli.main import main
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.data.zigzag import zigzag_slice
from megatron_mtp.errors import ConfigError
from megatron_mtp.parallel.params import moe_pattern
from megatron_mtp.recipes import RECIPES, get_recipe
from megatron_mtp.verify import run as verify
from megatron_mtp.verify.batches import MASKS, BatchSpec, seeded_samples
from megatron_mtp.verify.placements import Placement, parse_layouts
from megatron_mtp.verify.run import DENSE_LAYOUTS, EXPERT_LAYOUTS, default_layouts, prepare
from megatron_mtp.verify.shrink import shrink

TWO_RANKS = "pp=2; cp=2"


@pytest.fixture
def command(capsys):
    """Runs `megatron-mtp verify`: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["verify", *arguments])
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return call


@pytest.mark.unit
def test_layouts_are_read():
    layouts = parse_layouts("tp=2, sp=1; pp=4,layout=Ett|tt|mm|L ;; dp=2,distopt=1,recompute=block;")
    assert [layout.values for layout in layouts] == [
        {"tp": 2, "sp": True},
        {"pp": 4, "layout": "Ett|tt|mm|L"},
        {"dp": 2, "distopt": True, "recompute": "block"},
    ]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tp=2,ps=1", "'ps' in 'tp=2,ps=1' is unknown"),
        ("recomputed=block", "Did you mean recompute?"),
        ("tp=two", "tp=two in 'tp=two': must be an integer"),
        ("tp=0", "must be an integer of at least 1"),
        ("tp=2,tp=4", "tp occurs twice"),
        ("sp=yes", "must be 0 or 1"),
        ("recompute=all", "one of uniform, block, selective"),
        (" ; ", "is empty"),
    ],
)
def test_layouts_that_cannot_be_read(text, says):
    with pytest.raises(ConfigError) as caught:
        parse_layouts(text)
    assert says in str(caught.value)


@pytest.mark.unit
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_shrinks_for_its_default_layouts(recipe):
    cfg = get_recipe(recipe)
    comparison = prepare(cfg, None)
    model = comparison.reference.model
    assert model.hidden_size <= 64
    assert model.num_layers <= 4
    assert model.mtp_num_layers == cfg.copy().finalize().model.mtp_num_layers
    assert set(moe_pattern(model)) == set(moe_pattern(cfg.copy().finalize().model))
    assert len(comparison.layouts) == len(parse_layouts(default_layouts(cfg)))


@pytest.mark.unit
@pytest.mark.parametrize("layouts", ["tp=4,sp=1,ep=8,etp=1", "tp=8,sp=1,cp=2", "pp=4,vp=2", "dp=4,ep=4,mbs=4", "cp=8"])
def test_sizes_follow_the_layouts(layouts):
    comparison = prepare(get_recipe("deepseek_v3"), layouts)  # finalizes each layout, which checks every division
    wanted = dict(word.split("=") for word in layouts.split(","))
    model = comparison.layouts[0][1].model
    assert model.tensor_model_parallel_size == int(wanted.get("tp", 1))
    assert model.pipeline_model_parallel_size == int(wanted.get("pp", 1))
    assert model.hidden_size <= 256


@pytest.mark.unit
def test_the_recipe_is_not_touched_and_changes_are_named():
    cfg = get_recipe("deepseek_v3")
    before = cfg.to_dict()
    small, changes = shrink(cfg, parse_layouts(EXPERT_LAYOUTS))
    assert cfg.to_dict() == before
    assert small.model.moe_layer_freq == [0, 1, 1, 1]
    assert "num_layers 61 -> 4" in changes
    assert "precision.dtype bf16 -> fp32" in changes
    assert "moe_layer_freq (61 layers) -> [0, 1, 1, 1]" in changes


@pytest.mark.unit
def test_variants_of_mtp_and_recomputation_are_kept():
    cfg = get_recipe("qwen3_30b_a3b")
    apply_overrides(cfg, ["model.mtp_variant=parallel", "model.mtp_detach_heads=true", "model.mtp_num_layers=3"])
    comparison = prepare(cfg, "pp=2")
    placed = comparison.layouts[0][1].model
    assert (placed.mtp_variant, placed.mtp_detach_heads, placed.mtp_num_layers) == ("parallel", True, 3)
    assert (placed.recompute_method, placed.recompute_num_layers) == ("uniform", 1)
    assert comparison.reference.model.recompute_granularity is None


@pytest.mark.unit
def test_hand_written_layouts_must_agree():
    with pytest.raises(ConfigError, match="2, 3 decoder layers"):
        prepare(get_recipe("tiny_dense"), "pp=2,layout=Ett|mmL; pp=2,layout=Ett|tmmL")


@pytest.mark.unit
@pytest.mark.parametrize("mask", MASKS)
def test_batches_depend_on_seed_and_step_only(mask):
    spec = BatchSpec(num_samples=8, seq_length=32, vocab_size=50, num_depths=2, mask=mask)
    first, again, later = (seeded_samples(spec, step) for step in (0, 0, 1))
    assert (first.tokens == again.tokens).all()
    assert (first.base_mask == again.base_mask).all()
    assert (first.tokens != later.tokens).any()
    assert first.base_mask.sum() > 0
    assert first.starts.any() == (mask == "documents")


@pytest.mark.unit
def test_mistakes_are_one_message_before_torch_is_imported():
    code = (
        "import sys\n"
        "from megatron_mtp.cli.main import main\n"
        "try: main(['verify', 'tiny_moe', '--layouts', 'tp=2; dp=1,ep=2'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "False"]
    assert "Traceback" not in done.stderr
    assert "--layouts, tp=2: model.sequence_parallel" in done.stderr
    assert "--layouts, dp=1,ep=2: world_size = 1" in done.stderr


@pytest.mark.unit
def test_unknown_recipe(command):
    code, _, err = command("tiny_mo")
    assert code == 2
    assert "Did you mean tiny_moe" in err


@pytest.mark.dist
def test_the_command_says_right(command):
    code, out, err = command("tiny_mla_moe", "--layouts", TWO_RANKS, "--json")
    data = json.loads(out)
    assert code == 0
    assert "[1/3] one rank" in err
    assert [row["layout"] for row in data["outcomes"]] == ["pp=2", "cp=2"]
    assert all(row["right"] and row["counts_equal"] and row["acceptance_equal"] for row in data["outcomes"])
    assert all(0 < row["gradient_difference"] < 5e-6 for row in data["outcomes"])
    assert "hidden_size 64 -> 32" in data["shrunk"]


@pytest.mark.dist
def test_the_command_says_off(command, monkeypatch):
    """With another model as the reference, each part of the comparison must notice."""

    def with_another_reference(comparison):
        other = comparison.reference.copy()
        other.rng.seed += 1
        return replace(comparison, reference=other.finalize(1))

    monkeypatch.setattr(verify, "prepare", lambda *args: with_another_reference(prepare(*args)))
    code, out, _ = command("tiny_dense", "--layouts", "pp=2")
    assert code == 1
    assert "FAIL" in out
    for fault in ("loss of depth 2 differs", "acceptance counts differ", "gradient of", "initial weights of"):
        assert fault in out


def measure_with_masks_sliced_in_two_halves(cfg, spec):
    """`measure` where context-parallel ranks get contiguous loss masks, and all else in zigzag order."""
    from megatron_mtp.data import batch
    from megatron_mtp.verify.measure import measure

    def halves(array, cp_rank, cp_size):
        is_mask = array.dtype == np.float32
        return np.split(array, cp_size, axis=-1)[cp_rank] if is_mask else zigzag_slice(array, cp_rank, cp_size)

    with mock.patch.object(batch, "zigzag_slice", halves):
        return measure(cfg, spec)


@pytest.mark.dist
def test_a_fault_in_the_data_room_is_off(command, monkeypatch):
    monkeypatch.setattr("megatron_mtp.verify.measure.measure", measure_with_masks_sliced_in_two_halves)
    code, out, _ = command("tiny_dense", "--layouts", "pp=2; cp=2", "--json")
    without_cp, with_cp = json.loads(out)["outcomes"]
    assert code == 1
    assert without_cp["right"]
    assert with_cp["counts_equal"]  # no target is lost, but the wrong ones count
    assert with_cp["faults"][0].startswith("loss of depth 0 differs")


@pytest.mark.dist
def test_a_layout_that_does_not_run_is_off_and_the_next_still_runs(command, monkeypatch):
    def with_a_small_vocabulary_at_the_first(comparison):
        (layout, cfg), *others = comparison.layouts
        broken = cfg.copy()
        broken.model.vocab_size = broken.tokenizer.vocab_size = 8  # the batches hold larger ids
        return replace(comparison, layouts=[(layout, broken.finalize(2)), *others])

    monkeypatch.setattr(verify, "prepare", lambda *args: with_a_small_vocabulary_at_the_first(prepare(*args)))
    code, out, err = command("tiny_dense", "--layouts", "pp=2; dp=2", "--json")
    first, second = json.loads(out)["outcomes"]
    assert code == 1
    assert "it did not run" in first["faults"][0]
    assert first["gradient_difference"] is None
    assert second["right"]
    assert "Traceback" not in out + err


@pytest.mark.unit
def test_default_layouts_are_readable():
    for text in (DENSE_LAYOUTS, EXPERT_LAYOUTS):
        assert all(isinstance(layout, Placement) for layout in parse_layouts(text))


@pytest.mark.unit
def test_the_balancing_loss_of_the_recipe_is_checked():
    comparison = prepare(get_recipe("qwen3_30b_a3b"), None)
    assert comparison.reference.model.moe_router_load_balancing_type == "aux_loss"
    assert "mbs=1" not in [layout.text for layout, _ in comparison.layouts]
    with pytest.raises(ConfigError, match=r"--layouts, dp=2,mbs=1: 'aux_loss' balances within a micro-batch"):
        prepare(get_recipe("qwen3_30b_a3b"), "dp=2,mbs=1; pp=2")
