"""Core attention against the textbook formula in fp64: forward, and the gradients of queries, keys and values."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_mtp.device import cpu_facade
from megatron_mtp.errors import UnsupportedError
from megatron_mtp.mcore.groups import destroy_model_parallel, init_model_parallel
from megatron_mtp.model.torch_backend import attention
from megatron_mtp.model.torch_backend.attention import TorchCoreAttention, visible_keys
from tests.model.torch_backend.tiny import dense_config

TOLERANCE = 2e-6
SHAPES = {
    # b, s, query heads, key heads, width of queries and keys, width of values
    "plain": (2, 32, 4, 4, 8, 8),
    "grouped": (2, 32, 6, 2, 8, 8),
    "latent": (1, 32, 3, 3, 12, 6),
}
DOCUMENTS = [[0] * 5 + [1] * 1 + [2] * 26, [3] * 31 + [7] * 1]


@pytest.fixture(autouse=True)
def facade():
    cpu_facade.install("cpu")
    yield
    cpu_facade.uninstall()


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor | None) -> Tensor:
    """[s, b, heads, width] -> [s, b, heads * v_width], every score written out."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("ibnd,jbnd->bnij", q, k) * scale
    position = torch.arange(q.shape[0])
    hidden = position[None, :] > position[:, None]
    if segment_ids is not None:
        hidden = hidden | (segment_ids[:, :, None] != segment_ids[:, None, :])
        hidden = hidden[:, None]
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return torch.einsum("bnij,jbnd->ibnd", weights, v).flatten(2)


def sample(shape: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    b, s, heads, groups, width, v_width = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "q": draw(s, b, heads, width),
        "k": draw(s, b, groups, width),
        "v": draw(s, b, groups, v_width),
        "grad": draw(s, b, heads * v_width),
    }


def segments(shape: str, documents: bool) -> Tensor | None:
    return torch.tensor(DOCUMENTS[: SHAPES[shape][0]], dtype=torch.int32) if documents else None


def run(forward: Any, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and the gradients of q, k and v for the given output gradient."""
    q, k, v = (x[name].detach().requires_grad_() for name in "qkv")
    out = forward(q, k, v)
    out.backward(x["grad"])
    return {"out": out.detach(), "q": q.grad, "k": k.grad, "v": v.grad}


def core_attention(shape: str, cp_group: Any = None, **changes: Any) -> TorchCoreAttention:
    _, _, heads, groups, width, v_width = SHAPES[shape]
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = dense_config(
        num_attention_heads=heads, num_query_groups=groups, hidden_size=heads * width, kv_channels=width, **changes
    )
    groups = SimpleNamespace(cp=cp_group or one)
    return TorchCoreAttention(
        config, 1, AttnMaskType.causal, "self", k_channels=width, v_channels=v_width, pg_collection=groups
    )


def expected(shape: str, documents: bool, scale: float | None = None) -> dict[str, Tensor]:
    scale = scale or 1 / math.sqrt(SHAPES[shape][4])
    ids = segments(shape, documents)
    return run(lambda q, k, v: reference(q, k, v, scale, ids), sample(shape))


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    return max(float((got[n].double() - want[n]).norm() / want[n].norm()) for n in want)


@pytest.mark.unit
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_formula(shape, documents):
    core = core_attention(shape)
    got = run(lambda q, k, v: core(q, k, v, segments(shape, documents)), sample(shape, torch.float32))
    assert worst(got, expected(shape, documents)) < TOLERANCE


@pytest.mark.unit
def test_masks_in_tiles_change_nothing(monkeypatch):
    monkeypatch.setitem(attention.TILE_ROWS, "cpu", 7)  # 5 tiles, the last of 4 rows
    core = core_attention("grouped")
    got = run(lambda q, k, v: core(q, k, v, segments("grouped", True)), sample("grouped", torch.float32))
    assert worst(got, expected("grouped", True)) < TOLERANCE


@pytest.mark.unit
def test_softmax_scale_is_used():
    _, _, _, _, width, _ = SHAPES["plain"]
    core = TorchCoreAttention(
        dense_config(), 1, AttnMaskType.causal, "self", softmax_scale=0.1, k_channels=width, pg_collection=_alone()
    )
    got = run(lambda q, k, v: core(q, k, v), sample("plain", torch.float32))
    assert worst(got, expected("plain", False, scale=0.1)) < TOLERANCE


@pytest.mark.unit
def test_a_document_does_not_see_the_one_before():
    core, x = core_attention("plain"), sample("plain", torch.float32)
    ids = segments("plain", True)
    before = core(x["q"], x["k"], x["v"], ids)
    x["k"][:5, 0], x["v"][:5, 0] = 9.0, 9.0  # the first document of the first sample
    after = core(x["q"], x["k"], x["v"], ids)
    assert torch.equal(before[5:, 0], after[5:, 0])
    assert torch.equal(before[:, 1], after[:, 1])
    assert not torch.equal(before[:5, 0], after[:5, 0])


@pytest.mark.unit
def test_visible_keys_of_two_documents():
    rows = visible_keys(1, 4, torch.tensor([[0, 0, 1, 1]]), torch.device("cpu"))
    assert rows.int().tolist() == [[[[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]]


@pytest.mark.unit
def test_bf16_is_as_close_as_its_rounding():
    core = core_attention("grouped")
    got = run(lambda q, k, v: core(q, k, v), sample("grouped", torch.bfloat16))
    assert got["out"].dtype == torch.bfloat16
    assert worst(got, expected("grouped", False)) < 1e-2


@pytest.mark.unit
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("shape", ["grouped", "latent"])
def test_the_fused_kernel_of_the_cpu_runs(shape, documents):
    x = {name: tensor.requires_grad_() for name, tensor in sample(shape, torch.float32).items()}
    with torch.profiler.profile() as profile:
        core_attention(shape)(x["q"], x["k"], x["v"], segments(shape, documents))
    ran = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in ran
    assert "aten::_scaled_dot_product_attention_math" not in ran


@pytest.mark.unit
def test_dropout_draws_from_the_tensor_parallel_tracker():
    from megatron.core.tensor_parallel import random

    random.initialize_rng_tracker(force_reset=True)
    random.get_cuda_rng_tracker().add("model-parallel-rng", 11)
    core, x = core_attention("plain", attention_dropout=0.5), sample("plain", torch.float32)
    state = torch.get_rng_state()
    first, second = (core(x["q"], x["k"], x["v"]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    core.eval()
    assert worst({"out": core(x["q"], x["k"], x["v"])}, {"out": expected("plain", False)["out"]}) < TOLERANCE


@pytest.mark.unit
def test_what_is_not_built_is_refused():
    x = sample("plain", torch.float32)
    with pytest.raises(UnsupportedError, match="packed_seq_params"):
        core_attention("plain")(x["q"], x["k"], x["v"], packed_seq_params=object())
    with pytest.raises(UnsupportedError, match="attention_bias"):
        core_attention("plain")(x["q"], x["k"], x["v"], attention_bias=torch.zeros(1))
    with pytest.raises(UnsupportedError, match="window_size"):
        core_attention("plain", window_size=(4, 0))
    with pytest.raises(UnsupportedError, match="softmax_type"):
        core_attention("plain", softmax_type="off-by-one")
    with pytest.raises(UnsupportedError, match="causally only"):
        TorchCoreAttention(dense_config(), 1, AttnMaskType.padding, "self", pg_collection=_alone())


def _alone() -> SimpleNamespace:
    return SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))


def zigzag(x: Tensor, cp: int, rank: int) -> Tensor:
    chunks = x.chunk(2 * cp)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]])


def sharded_run(shape: str, documents: bool, cp: int, tile_rows: int) -> float:
    """Worst relative difference of this rank's output and gradients to its slice of the reference."""
    group = init_model_parallel(tp=1, pp=1, vp=None, cp=cp, ep=1, etp=1, embedding_stages=[0]).cp
    destroy_model_parallel()
    core = core_attention(shape, group, context_parallel_size=cp)
    local = {name: zigzag(x, cp, group.rank()) for name, x in sample(shape, torch.float32).items()}
    with mock.patch.dict(attention.TILE_ROWS, cpu=tile_rows):
        got = run(lambda q, k, v: core(q, k, v, segments(shape, documents)), local)
    want = {name: zigzag(x, cp, group.rank()) for name, x in expected(shape, documents).items()}
    return worst(got, want)


@pytest.mark.dist
@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("shape", SHAPES)
def test_context_parallel_matches_the_formula(ranks, shape, documents, cp):
    assert max(ranks(4).run(sharded_run, shape, documents, cp, 256)) < TOLERANCE


@pytest.mark.dist
def test_context_parallel_in_tiles_matches_the_formula(ranks):
    assert max(ranks(4).run(sharded_run, "grouped", False, 2, 3)) < TOLERANCE
