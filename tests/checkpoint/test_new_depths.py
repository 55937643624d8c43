"""A run goes on with more MTP depths, or fewer: what is old stays bit-equal, and new layers are those of any layout."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.checkpoint.new_layers import largest_first_update
from megatron_mtp.checkpoint.stored import StoredTensors
from megatron_mtp.checkpoint.untrusted import read_metadata
from tests.checkpoint.rig import (
    CP2,
    DENSE,
    DP,
    EP2,
    MOE,
    PP2,
    TIED,
    TP2,
    VP2,
    Losses,
    differences,
    make_config,
    real_steps,
    rig,
)

pytestmark = pytest.mark.dist

BF16 = {**DENSE, "precision.dtype": "bf16"}
WHOLE = {"ddp.use_distributed_optimizer": False}
LATENT = {
    **DENSE,
    "model.multi_latent_attention": True,
    "model.q_lora_rank": 16,
    "model.kv_lora_rank": 16,
    "model.qk_head_dim": 8,
    "model.qk_pos_emb_head_dim": 4,
    "model.v_head_dim": 8,
    "model.num_query_groups": None,
}
PARALLEL = {**DENSE, "model.mtp_variant": "parallel"}
OWN_STAGE = {**PP2, "model.pipeline_model_parallel_layout": "Etttt|mmL"}
LAYOUTS = {"dp": DP, "tp": TP2, "own stage": OWN_STAGE}
SAVED_AT = 2

Tensors = dict[str, torch.Tensor]


def depths(count: int, init: str | None = None) -> dict[str, Any]:
    return {"model.mtp_num_layers": count, "model.mtp_new_layers_init": init}


def save(values: dict[str, Any], directory: str, steps: int = SAVED_AT) -> None:
    """Trains from scratch and saves; depth k has accepted k of 10 so far."""
    with rig(make_config(values, dist.get_world_size(), directory)) as run:
        run.steps(steps)
        counted = {"chain_hits": list(range(1, run.cfg.model.mtp_num_layers + 1))}
        run.state.add_acceptance(counted if counted["chain_hits"] else {})
        run.save()


def go_on(values: dict[str, Any], directory: str, steps: int = 0) -> list[str]:
    """Resumes in the same directory, trains `steps`, saves to `directory`/new, and returns what was logged."""
    changed = {**values, "checkpoint.save": f"{directory}/new"}
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]  # a list of lines
    logger = logging.getLogger("megatron_mtp.checkpoint")
    logger.addHandler(handler)
    try:
        with rig(make_config(changed, dist.get_world_size(), directory)) as run:
            assert run.resume()
            run.steps(steps)
            run.save()
    finally:
        logger.removeHandler(handler)
    return lines


def stored(directory: str | Path) -> Tensors:
    """Every tensor of the newest checkpoint, optimizer included."""
    run = RunDirectory(directory)
    folder = run.final_path(run.iterations()[0])
    found = StoredTensors(folder, read_metadata(folder), with_optimizer=True)
    whole = {key: found.whole(key) for key in found.tensors}
    # The padding of the vocabulary depends on TP.
    return {key: t[:100] if "word_embeddings" in key or "output_layer" in key else t for key, t in whole.items()}


def is_of(layer: int, key: str) -> bool:
    return f"mtp.layers.{layer}." in key


def check_growth(old: Tensors, new: Tensors, init: str, added: range) -> None:
    """Old tensors are bit-equal; new moments are zero and new master weights the weights; copies are copies."""
    moments, weights = ("exp_avg", "exp_avg_sq"), {key for key in new if not key.startswith("optimizer.")}
    for key, tensor in old.items():
        assert torch.equal(tensor, new[key]), key
    surplus = new.keys() - old.keys()
    assert {layer for layer in range(9) for key in surplus if is_of(layer, key)} == set(added)
    assert all(any(is_of(layer, key) for layer in added) for key in surplus)
    assert {f"optimizer.state.exp_avg.{key}" for key in surplus & weights if "expert_bias" not in key} <= surplus
    for key in surplus - weights:
        _, _, name, weight = key.split(".", 3)
        if name in moments:
            assert not new[key].any(), key
        else:
            assert torch.equal(new[key], new[weight].float()), key
    for key in surplus & weights:
        _, _, layer, name = key.split(".", 3)
        source = copied_from(old, init, name, min(added))
        if source is not None:
            assert torch.equal(new[key], source), key
        elif "norm" in name:
            assert bool((new[key] == 1).all()), key
        else:
            assert float(new[key].float().std()) * (8**0.5 if "fc2" in name or "linear_proj" in name else 1) > 0.015
        assert int(layer) in added


def copied_from(old: Tensors, init: str, name: str, first: int) -> torch.Tensor | None:
    if init == "last_depth":
        return old[f"mtp.layers.{first - 1}.{name}"]
    if init == "fresh" or not name.startswith(("transformer_layer.", "final_layernorm.")):
        return None
    name = name.removeprefix("transformer_layer.")
    if name.startswith("mlp.linear_fc") and "decoder.layers.3.mlp.router.weight" in old:
        return None  # model.mtp_layer_mlp
    if f"decoder.layers.{name}" in old:
        return old[f"decoder.layers.{name}"][-1]
    return old[f"decoder.layers.3.{name}" if f"decoder.layers.3.{name}" in old else f"decoder.{name}"]


# name: (model, layout before, layout after, depths before, depths after, how new layers start)
CASES: dict[str, tuple[dict, dict, dict, int, int, str]] = {
    "none, untied, to a stage of its own": (DENSE, DP, OWN_STAGE, 0, 2, "last_layer"),
    "none, tied": (TIED, PP2, DP, 0, 1, "last_layer"),
    "one, dp to tp": (DENSE, DP, TP2, 1, 2, "last_depth"),
    "one, bf16": (BF16, PP2, TP2, 1, 2, "fresh"),
    "one, bf16, copied": (BF16, DP, PP2, 1, 2, "last_layer"),
    "one, bf16, whole": ({**BF16, **WHOLE}, DP, PP2, 1, 3, "last_depth"),
    "one, fp32, whole": ({**DENSE, **WHOLE}, DP, DP, 1, 2, "fresh"),
    "experts": (MOE, PP2, EP2, 1, 2, "last_layer"),
    "experts from none": (MOE, EP2, TP2, 0, 2, "last_layer"),
    "experts, dense depths": ({**MOE, "model.mtp_layer_mlp": "dense"}, EP2, PP2, 0, 2, "last_layer"),
    "experts, copied depth": (MOE, EP2, PP2, 1, 2, "last_depth"),
    "latent attention": (LATENT, DP, TP2, 0, 1, "last_layer"),
    "parallel": (PARALLEL, DP, PP2, 1, 2, "last_layer"),
    "virtual stages": (DENSE, TP2, VP2, 1, 2, "fresh"),
    "context": (TIED, VP2, CP2, 0, 2, "fresh"),
}
FAST = {"none, untied, to a stage of its own", "one, bf16, copied"}


@pytest.mark.parametrize(
    ("model", "before", "after", "num_old", "num_new", "init"),
    [pytest.param(*case, marks=() if name in FAST else pytest.mark.slow, id=name) for name, case in CASES.items()],
)
def test_old_tensors_stay_and_new_ones_follow_the_rule(ranks, tmp_path, model, before, after, num_old, num_new, init):
    ranks(2).run(save, {**model, **before, **depths(num_old)}, str(tmp_path))
    lines = ranks(2).run(go_on, {**model, **after, **depths(num_new, init)}, str(tmp_path))[0]
    check_growth(stored(tmp_path), stored(tmp_path / "new"), init, range(num_old, num_new))
    assert [line for line in lines if f"depth {num_new} is new" in line and "moments" in line]


def curve(values: dict[str, Any], directory: str, steps: int, saves: bool = False) -> Losses:
    """Losses of `steps` real steps after a resume, or from scratch; saves at the end to the same directory."""
    real = {"optimizer.clip_grad": 1.0, "dataset.prefetch_steps": 0, **values}
    with rig(make_config(real, dist.get_world_size(), directory)) as run:
        run.resume()
        found = real_steps(run.run, run.state, steps)
        if saves:
            run.save()
        return found


def test_the_first_step_has_the_old_losses(ranks, tmp_path):
    """What the added depth does to gradients shows from the second step on."""
    ranks(2).run(curve, {**DENSE, **depths(1)}, str(tmp_path), 3, True)
    old = ranks(2).run(curve, {**DENSE, **depths(1)}, str(tmp_path), 2)[0]
    new = ranks(2).run(curve, {**DENSE, **depths(2, "last_depth")}, str(tmp_path), 2)[0]
    assert new[0][:2] == old[0]
    assert new[1][0] != old[1][0]
    assert len(new[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("model", [DENSE, TIED, MOE], ids=["untied", "tied", "experts"])
def test_the_curve_is_that_of_any_layout_and_of_a_run_resumed_after_the_change(ranks, tmp_path, model):
    grown = {**model, **depths(2, "last_layer")}
    first = str(tmp_path / "first")
    ranks(2).run(curve, {**model, **depths(0)}, first, 3, True)
    whole = {name: ranks(2).run(curve, {**grown, **layout}, first, 4)[0] for name, layout in LAYOUTS.items()}
    for name, losses in whole.items():
        worst = max(abs(a - b) for x, y in zip(losses, whole["dp"], strict=True) for a, b in zip(x, y, strict=True))
        assert worst < 1e-5, f"{name} differs from dp by {worst:.1e}"
    for name, layout in LAYOUTS.items():
        second = tmp_path / name.replace(" ", "_")
        shutil.copytree(first, second)
        early = ranks(2).run(curve, {**grown, **layout}, str(second), 2, True)[0]
        late = ranks(2).run(curve, {**model, **depths(2), **layout}, str(second), 2)[0]
        assert early + late == whole[name]


def roll_back(directory: str) -> tuple[Tensors, Tensors, dict[str, float]]:
    """Weights after a resume with a new depth, those after a step, and what a return to before the resume changes."""
    with rig(make_config({**DENSE, **depths(2, "last_layer")}, dist.get_world_size(), directory)) as run:
        assert run.resume()
        before = run.weights()
        run.steps(1)
        after = run.weights()
        run.checkpointer.roll_back(run.chunks, run.optimizer, run.state)
        return before, after, differences(before, run.weights())


def test_going_back_to_before_the_change_starts_the_new_layers_again(ranks, tmp_path):
    ranks(2).run(save, {**DENSE, **depths(1)}, str(tmp_path))
    before, after, changed = ranks(2).run(roll_back, str(tmp_path))[0]
    assert all(key in differences(before, after) for key in before if is_of(1, key))
    assert changed == {}


@pytest.mark.parametrize("num_new", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_fewer_depths_drop_the_last_layers(ranks, tmp_path, num_new):
    ranks(2).run(save, {**DENSE, **depths(2)}, str(tmp_path))
    lines = ranks(2).run(go_on, {**DENSE, **PP2, **depths(num_new)}, str(tmp_path))[0]
    old, new = stored(tmp_path), stored(tmp_path / "new")
    assert new.keys() == {key for key in old if not any(is_of(layer, key) for layer in range(num_new, 2))}
    assert all(torch.equal(old[key], tensor) for key, tensor in new.items())
    assert "the layer of depth 2 is dropped, with its optimizer state" in lines


@pytest.mark.slow
def test_a_repeated_layer_may_be_repeated_more_often_and_taken_apart(ranks, tmp_path):
    repeated = {**DENSE, "model.mtp_use_repeated_layer": True}
    ranks(2).run(save, {**DENSE, **depths(1)}, str(tmp_path))
    ranks(2).run(go_on, {**repeated, **depths(3)}, str(tmp_path))
    assert {k: v.tolist() for k, v in stored(tmp_path).items()} == {
        k: v.tolist() for k, v in stored(tmp_path / "new").items()
    }
    ranks(2).run(go_on, {**DENSE, **depths(3, "last_depth")}, str(tmp_path / "new"))
    check_growth(stored(tmp_path), stored(tmp_path / "new" / "new"), "last_depth", range(1, 3))


def start_from_weights(values: dict[str, Any], directory: str) -> Tensors:
    with rig(make_config(values, dist.get_world_size(), None)) as run:
        run.checkpointer.start_from_pretrained(run.chunks, run.optimizer)
        masters = [p for s in run.optimizer.chained_optimizers for g in s.optimizer.param_groups for p in g["params"]]
        assert all(bool(torch.isfinite(master).all()) for master in masters)
        return run.weights()


@pytest.mark.slow
def test_a_new_run_may_start_from_weights_with_fewer_layers(ranks, tmp_path):
    ranks(2).run(save, {**BF16, **depths(0)}, str(tmp_path))
    more = {**BF16, **depths(1, "last_layer")}
    grown = ranks(2).run(start_from_weights, {**more, "checkpoint.pretrained_checkpoint": str(tmp_path)}, "")[0]
    ranks(2).run(go_on, {**more, "model.mtp_freeze_trunk": True, "checkpoint.load_optim": False}, str(tmp_path))
    resumed = stored(tmp_path / "new")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in grown.items() if "@" not in key)


def accepted(directory: str) -> dict[str, list[int]]:
    with rig(make_config({**DENSE, **depths(2, "fresh")}, dist.get_world_size(), directory)) as run:
        assert run.resume()
        run.state.add_acceptance({"chain_hits": [5, 5]})
        return run.state.acceptance


def test_acceptance_of_a_new_depth_is_counted_from_zero(ranks, tmp_path):
    ranks(2).run(save, {**DENSE, **depths(1)}, str(tmp_path))
    assert ranks(2).run(accepted, str(tmp_path))[0] == {"chain_hits": [6, 5]}


@pytest.mark.unit
@pytest.mark.parametrize(("beta2", "step", "factor"), [(0.95, 1000, 1.10), (0.999, 10_000, 6.57), (0.999, 1, None)])
def test_the_first_updates_are_those_of_adam(beta2, step, factor):
    """Against torch's Adam with a steady gradient, moments of zero, and a step count that goes on."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=1.0, betas=(0.9, beta2), eps=0.0)
    weight.grad = torch.full((1,), 3.0, dtype=torch.float64)
    zeros = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    adam.state[weight] = {"step": torch.tensor(float(step)), **zeros}
    updates = []
    for _ in range(300):
        before = float(weight)
        adam.step()
        updates.append(before - float(weight))
    assert largest_first_update(0.9, beta2, step) == pytest.approx(max(updates), rel=1e-6)
    assert factor is None or max(updates) == pytest.approx(factor, abs=0.01)
