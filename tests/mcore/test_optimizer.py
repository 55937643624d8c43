from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mtp.mcore.optimizer import single_optimizers
from tests.harness.models import small_config
from tests.harness.ranks import Ranks
from tests.harness.runs import opened

pytestmark = pytest.mark.dist


def forms_of_adam() -> list[set[tuple[object, object]]]:
    """The kernels after building, and after loading the options of a run that had others."""
    with opened(small_config("tiny_dense", (), 1)) as run:
        run.engine.train(next(run.data.train(0)), 1.0)
        [single] = single_optimizers(run.engine.optimizer)
        adam = single.optimizer
        found = [{(group["fused"], group["foreach"]) for group in adam.param_groups}]
        kept = adam.state_dict()
        for group in kept["param_groups"]:
            group["fused"], group["foreach"] = None, None
        adam.load_state_dict(kept)
        assert isinstance(adam, torch.optim.AdamW)
        return [*found, {(group["fused"], group["foreach"]) for group in adam.param_groups}]


def test_adam_is_fused_before_and_after_a_load(ranks: Ranks):
    assert ranks(1).run(forms_of_adam) == [[{(True, False)}] * 2]


class BufferCopies(TorchDispatchMode):
    """Notes operations that copy or scale whole buffers and gradients."""

    def __init__(self, sizes: set[int]):
        super().__init__()
        self.sizes, self.found = sizes, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d") and ("gather" in name or "reduce_scatter" in name):
            self.found.append(name)
        copies = name.startswith(("aten.copy_", "aten.mul.Tensor", "aten.clone"))
        if copies and isinstance(args[0], torch.Tensor) and args[0].numel() in self.sizes:
            self.found.append(f"{name} {args[0].numel()}")
        return func(*args, **(kwargs or {}))


def copies_of_a_step() -> tuple[list[str], list[float]]:
    with opened(small_config("tiny_dense", ("optimizer.clip_grad=1e-3",), 1)) as run:
        batch = next(run.data.train(0))
        [chunk] = run.engine.chunks
        sizes = {buffer.grad_data.numel() for buffer in chunk.buffers}
        with BufferCopies(sizes) as mode:
            result = run.engine.train(batch, 1.0)
        [single] = single_optimizers(run.engine.optimizer)
        gradients = [p.grad for group in single.optimizer.param_groups for p in group["params"]]
        clipped = torch.stack(torch._foreach_norm(gradients)).norm()
        return mode.found, [result.grad_norm, float(clipped)]


def test_a_rank_alone_copies_no_buffer(ranks: Ranks):
    [(copies, (norm, clipped))] = ranks(1).run(copies_of_a_step)
    assert copies == []
    assert norm > 1e-2
    assert clipped == pytest.approx(1e-3, rel=1e-3)
