"""What is restored beside fp32 weights: master weights, loss scale, counters, random numbers; for every optimizer."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_mtp.checkpoint.manifest import read_manifest
from megatron_mtp.data.data_file import LocalFile, sampled_hash
from megatron_mtp.errors import CheckpointError
from megatron_mtp.mcore.optimizer import copy_master_weights_to_model, single_optimizers
from megatron_mtp.training.state import TrainState
from tests.checkpoint.rig import DENSE, PP2, TP2, Rig, differences, make_config, resumed, rig, trained
from tests.data.corpora import write_corpus

pytestmark = pytest.mark.dist

BF16 = {**DENSE, "precision.dtype": "bf16"}
FP16 = {**DENSE, "precision.dtype": "fp16", "precision.loss_scale_window": 2, "precision.initial_loss_scale": 1024.0}
WHOLE = {"ddp.use_distributed_optimizer": False}
SGD = {**DENSE, **WHOLE, "optimizer.optimizer": "sgd"}


CASES = {
    "bf16": (BF16, {}),
    "fp16": (FP16, {}),
    "fp32-whole": ({**DENSE, **WHOLE}, {}),
    "bf16-whole": ({**BF16, **WHOLE}, {}),
    "sgd": (SGD, {}),
    "bf16-to-tp2": (BF16, TP2),
    "bf16-whole-to-pp2": ({**BF16, **WHOLE}, PP2),
}
FAST = {("bf16", 2), ("fp16", 2), ("sgd", 2), ("bf16-whole-to-pp2", 2), ("bf16", 0), ("fp32-whole", 0)}


@pytest.mark.parametrize(
    ("model", "layout", "save_at"),
    [
        pytest.param(*case, save_at, marks=() if (name, save_at) in FAST else pytest.mark.slow, id=f"{name}-{save_at}")
        for name, case in CASES.items()
        for save_at in (0, 2)
    ],
)
def test_resume_is_bit_equal(ranks, tmp_path, model, layout, save_at):
    expected = ranks(2).run(trained, model, 4, str(tmp_path), save_at)[0]
    start, weights = ranks(2).run(resumed, {**model, **layout}, 4, str(tmp_path))[0]
    assert start == save_at
    assert differences(expected, weights) == {}


def save_with_counters(values: dict, directory: str) -> list:
    """Saves, and returns what follows in every stream of random numbers."""
    with rig(make_config(values, dist.get_world_size(), directory)) as run:
        run.steps(1)
        run.state.add_acceptance({"matches_target": [2**40, 7]})
        run.state.wandb_run_id = "abc"
        if scaler := run.optimizer.chained_optimizers[0].grad_scaler:
            scaler._scale.fill_(512.0)
            scaler._growth_tracker = 1
        advance_streams()
        run.save()
        return draw_streams()


def resume_with_counters(values: dict, directory: str) -> tuple:
    with rig(make_config(values, dist.get_world_size(), directory)) as run:
        assert run.resume()
        scaler = run.optimizer.chained_optimizers[0].grad_scaler
        scale = None if scaler is None else (float(scaler.scale), scaler._growth_tracker)
        return run.state, scale, draw_streams()


def advance_streams() -> None:
    """Moves every stream away from its seed, differently on each rank."""
    for _ in range(3 + dist.get_rank()):
        draw_streams()


def draw_streams() -> list:
    with get_cuda_rng_tracker().fork():
        dropout = torch.rand(2).tolist()
    return [random.random(), float(np.random.rand()), torch.rand(2).tolist(), dropout]


@pytest.mark.parametrize("model", [pytest.param(DENSE, marks=pytest.mark.slow), FP16], ids=["fp32", "fp16"])
def test_counters_loss_scale_and_random_streams_go_on(ranks, tmp_path, model):
    streams = ranks(2).run(save_with_counters, model, str(tmp_path))
    assert streams[0] != streams[1], "ranks must differ, or this test cannot tell them apart"
    expected = TrainState(
        iteration=1,
        consumed_samples=8,
        consumed_tokens=128,
        acceptance={"matches_target": [2**40, 7]},
        wandb_run_id="abc",
    )
    for rank, (state, scale, drawn) in enumerate(ranks(2).run(resume_with_counters, model, str(tmp_path))):
        assert state == expected
        assert scale == ((512.0, 1) if model is FP16 else None)
        assert drawn == streams[rank]


def test_random_streams_are_not_carried_to_other_places(ranks, tmp_path):
    streams = ranks(2).run(save_with_counters, DENSE, str(tmp_path))
    for rank, (_, _, drawn) in enumerate(ranks(2).run(resume_with_counters, {**DENSE, **TP2}, str(tmp_path))):
        assert drawn != streams[rank]


def change_dtype(old: dict, new: dict, directory: str) -> tuple:
    """Masters before and after a resume in another dtype; the model's weights then, and the masters cast to it."""
    with rig(make_config(old, dist.get_world_size(), directory)) as run:
        run.steps(2)
        run.save()
        before = masters(run)
    with rig(make_config(new, dist.get_world_size(), directory)) as run:
        assert run.resume()
        after, weights = masters(run), run.weights()
        copy_master_weights_to_model(single_optimizers(run.optimizer), run.chunks)
        return before, after, weights, run.weights()


def masters(run: Rig) -> list[torch.Tensor]:
    """This rank's shard of the fp32 master weights."""
    single = run.optimizer.chained_optimizers[0]
    return [p.detach().float().clone() for group in single.optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (DENSE, BF16),
        pytest.param(BF16, DENSE, marks=pytest.mark.slow),
        pytest.param(BF16, FP16, marks=pytest.mark.slow),
    ],
    ids=["fp32-bf16", "bf16-fp32", "bf16-fp16"],
)
def test_a_change_of_dtype_goes_on_from_the_master_weights(ranks, tmp_path, old, new):
    """`weights` also checks that data-parallel copies agree, which loading the masters alone would break."""
    for before, after, weights, expected in ranks(2).run(change_dtype, old, new, str(tmp_path)):
        assert len(before) == len(after) > 0
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        if weights is not None:
            assert differences(expected, weights) == {}


def without_optimizer(directory: str) -> tuple:
    plain = make_config({**BF16, "checkpoint.load_optim": False}, dist.get_world_size(), directory)
    with rig(make_config(BF16, dist.get_world_size(), directory)) as run:
        run.steps(2)
        run.save()
        expected = run.weights()
    with rig(plain) as run:
        assert run.resume()
        same = run.weights()
        fresh = all(
            float(s["exp_avg"].abs().sum()) == 0 for s in run.optimizer.chained_optimizers[0].optimizer.state.values()
        )
        equal = all(torch.equal(m.bfloat16().float(), m) for m in masters(run))
        return expected, same, fresh, equal, run.state.iteration


def test_weights_alone_may_be_loaded(ranks, tmp_path):
    expected, same, fresh, equal, iteration = ranks(2).run(without_optimizer, str(tmp_path))[0]
    assert differences(expected, same) == {}
    assert fresh
    assert equal, "the masters must start from the loaded weights"
    assert iteration == 2


def saved_without_optimizer(directory: str) -> str:
    with rig(make_config({**DENSE, "checkpoint.save_optim": False}, dist.get_world_size(), directory)) as run:
        run.steps(1)
        run.save()
    with rig(make_config(DENSE, dist.get_world_size(), directory)) as run:
        with pytest.raises(CheckpointError) as caught:
            run.resume()
        return str(caught.value)


def test_a_checkpoint_without_optimizer_state_says_so(ranks, tmp_path):
    for message in ranks(2).run(saved_without_optimizer, str(tmp_path)):
        assert "was saved without optimizer state" in message
        assert "checkpoint.load_optim=false" in message


def resume_other_model(directory: str) -> str:
    with rig(make_config(DENSE, dist.get_world_size(), directory)) as run:
        run.steps(1)
        run.save()
    with rig(
        make_config({**DENSE, "model.ffn_hidden_size": 64, "rng.seed": 5}, dist.get_world_size(), directory)
    ) as run:
        with pytest.raises(CheckpointError) as caught:
            run.resume()
        return str(caught.value)


def test_another_models_run_is_refused_on_every_rank(ranks, tmp_path):
    for message in ranks(2).run(resume_other_model, str(tmp_path)):
        assert "model.ffn_hidden_size = 64: the checkpoint was saved with 48" in message
        assert "rng.seed = 5" in message


def fresh_start(directory: str) -> bool:
    with rig(make_config(DENSE, dist.get_world_size(), directory)) as run:
        return run.resume()


def test_an_empty_directory_is_a_fresh_start(ranks, tmp_path):
    assert ranks(2).run(fresh_start, str(tmp_path / "new")) == [False, False]


def resume_with_extra_state(path: str, at_save: bool, at_load: bool) -> tuple:
    """As if the modules were Transformer Engine's, which add an object of their own to the state."""
    outcomes = []
    for has_extra, work in ((at_save, "save"), (at_load, "resume")):
        with rig(make_config(DENSE, dist.get_world_size(), path)) as run:
            norm = type(run.chunks[0].module.decoder.final_layernorm)
            if has_extra:
                norm.get_extra_state = lambda self: torch.zeros(3, dtype=torch.uint8)
                norm.set_extra_state = lambda self, state: None
            try:
                assert ("decoder.final_layernorm._extra_state" in run.chunks[0].module.state_dict()) == has_extra
                if work == "save":
                    run.steps(1)
                outcomes.append(getattr(run, work)())
                outcomes.append(run.weights())
            finally:
                if has_extra:
                    del norm.get_extra_state, norm.set_extra_state
    return outcomes


@pytest.mark.parametrize(
    ("at_save", "at_load"),
    [(True, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, True), (True, True)))],
)
def test_the_backend_may_change(ranks, tmp_path, at_save, at_load):
    _, saved, resumed_, weights = ranks(2).run(resume_with_extra_state, str(tmp_path), at_save, at_load)[0]
    assert resumed_
    assert differences(saved, weights) == {}


OVERLAPPED = {**DENSE, "ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True}


def save_only(values: dict, steps: int, path: str) -> None:
    with rig(make_config(values, dist.get_world_size(), path)) as run:
        run.steps(steps)
        run.save()


def test_the_manifest_knows_the_data(ranks, tmp_path):
    write_corpus(tmp_path / "text", [100] * 100)
    data = {"dataset.mock": False, "dataset.blend": [[str(tmp_path / "text")], None], "validation.eval_iters": 0}
    ranks(2).run(save_only, {**DENSE, **data}, 1, str(tmp_path / "run"))
    known = read_manifest(tmp_path / "run" / "iter_0000001").data
    assert known == [sampled_hash(LocalFile(tmp_path / f"text{end}", "") for end in (".bin", ".idx"))]


def test_weights_are_of_the_step_even_if_they_are_gathered_later(ranks, tmp_path):
    """The weights themselves, without the optimizer's: what an export or a run with load_optim=false reads."""
    ranks(2).run(save_only, OVERLAPPED, 3, str(tmp_path))
    weights = ranks(2).run(resumed, {**DENSE, "checkpoint.load_optim": False}, 3, str(tmp_path))[0][1]
    assert differences(ranks(2).run(trained, DENSE, 3)[0], weights) == {}
