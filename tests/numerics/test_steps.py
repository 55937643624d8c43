"""Steps with clipping on two ranks against one: gradient norms, losses after updates, and weights."""

from __future__ import annotations

import pytest

from tests.harness.models import SMALL
from tests.harness.runs import curve

pytestmark = pytest.mark.dist

STEPS = 3
# A norm far above the limit, so that every step is clipped.
RUN = (*SMALL, "optimizer.clip_grad=0.05", "optimizer.lr=1e-3", "optimizer.min_lr=1e-4", "scheduler.lr_warmup_iters=0")
VARIANTS = {
    "detached": ("tiny_dense", ("model.mtp_detach_heads=true",)),
    "repeated": ("tiny_mla_moe", ("model.mtp_use_repeated_layer=true", "model.moe_z_loss_coeff=0.01")),
    "parallel": ("tiny_mla_moe", ("model.mtp_variant=parallel",)),
}
LAYOUTS = {
    "tp2_sp": ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
    "tp2_ep2": (
        "model.tensor_model_parallel_size=2",
        "model.sequence_parallel=true",
        "model.expert_model_parallel_size=2",
        "model.expert_tensor_parallel_size=1",
    ),
    "pp2": ("model.pipeline_model_parallel_size=2",),
    "cp2": ("model.context_parallel_size=2",),
    "dp2_distributed_optimizer": ("ddp.use_distributed_optimizer=true",),
}
QUICK = {("detached", "pp2"), ("repeated", "tp2_ep2"), ("parallel", "dp2_distributed_optimizer")}
CASES = [
    pytest.param(variant, layout, marks=[] if (variant, layout) in QUICK else [pytest.mark.slow])
    for variant in VARIANTS
    for layout in LAYOUTS
    if (variant, layout) != ("detached", "tp2_ep2")
]


@pytest.fixture(scope="module")
def alone(ranks):
    return {name: ranks(1).run(curve, recipe, (*RUN, *fields), STEPS)[0] for name, (recipe, fields) in VARIANTS.items()}


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_clipped_steps_equal_one_rank(ranks, alone, variant, layout):
    recipe, fields = VARIANTS[variant]
    got, reference = ranks(2).run(curve, recipe, (*RUN, *fields, *LAYOUTS[layout]), STEPS)[0], alone[variant]
    assert got.grad_norms == pytest.approx(reference.grad_norms, rel=1e-5)
    assert min(reference.grad_norms) > 0.05
    for mine, theirs in zip(got.losses, reference.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
