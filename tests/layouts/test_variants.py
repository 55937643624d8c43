"""Tied embeddings, recomputation and micro-batch sizes together with parallelism."""

from __future__ import annotations

import pytest

from megatron_mtp.config import ConfigContainer

pytestmark = pytest.mark.dist

# Adding up the same samples in other groups; measured 4e-7 to 8e-7.
CUT_TOLERANCE = 2e-6


def tied(cfg: ConfigContainer) -> None:
    cfg.model.share_embeddings_and_output_weights = True


def repeated(cfg: ConfigContainer) -> None:
    cfg.model.mtp_use_repeated_layer = True


def detached(cfg: ConfigContainer) -> None:
    cfg.model.mtp_detach_heads = True


def parallel_heads(cfg: ConfigContainer) -> None:
    cfg.model.mtp_variant = "parallel"


def grouped(cfg: ConfigContainer) -> None:
    cfg.model.moe_grouped_gemm = True


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("moe", "tp=2,sp=1,ep=2,etp=2"),
        pytest.param("moe", "ep=2", marks=pytest.mark.slow),
        pytest.param("mla_moe", "tp=2,sp=1,ep=2,etp=1", marks=pytest.mark.slow),
        pytest.param("mla_moe", "pp=2,ep=2", marks=pytest.mark.slow),
    ],
)
def test_grouped_products(compared, model, layout):
    assert compared(model, layout, change=grouped).faults() == []


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("dense", "tp=2"),
        ("dense", "pp=2"),
        ("dense", "pp=4,layout=Ett|tt|mm|L"),
        pytest.param("mla_moe", "pp=2,vp=2", marks=pytest.mark.slow),
        pytest.param("mla_moe", "pp=4,layout=Ett|tt|mm|L", marks=pytest.mark.slow),
        pytest.param("mla_moe", "tp=2,sp=1,ep=2,etp=1", marks=pytest.mark.slow),
    ],
)
def test_tied_embeddings(compared, model, layout):
    assert compared(model, layout, change=tied).faults() == []


@pytest.mark.parametrize("recompute", ["uniform", "block", "selective"])
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("dense", "pp=2"),
        ("dense", "tp=2,sp=1"),
        pytest.param("mla_moe", "pp=2", marks=pytest.mark.slow),
        pytest.param("mla_moe", "tp=2,sp=1", marks=pytest.mark.slow),
        pytest.param("mla_moe", "pp=2,vp=2", marks=pytest.mark.slow),
        pytest.param("dense", "pp=4,layout=Ett|tt|mm|L", marks=pytest.mark.slow),
    ],
)
def test_recomputation_against_a_reference_without_it(compared, model, layout, recompute):
    assert compared(model, f"{layout},recompute={recompute}").faults() == []


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
@pytest.mark.parametrize("model", ["dense", "mla_moe"])
def test_the_size_of_micro_batches_does_not_matter(compared, model, micro_batch_size):
    difference = compared(model, f"mbs={micro_batch_size}")
    assert difference.faults() == []
    assert difference.gradient <= CUT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("change", [repeated, detached, parallel_heads])
@pytest.mark.parametrize("layout", ["tp=2,sp=1", "pp=2,vp=2", "pp=4,layout=Ett|tt|mm|L", "cp=2", "dp=2,distopt=1"])
@pytest.mark.parametrize("model", ["dense", "mla_moe"])
def test_variants_of_mtp(compared, model, layout, change):
    assert compared(model, layout, change=change).faults() == []
