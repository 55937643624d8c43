"""Chunked cross entropy against whole logits in fp64, alone and with the vocabulary in shards."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mtp.objective import cross_entropy
from megatron_mtp.objective.cross_entropy import VocabShard, chunked_cross_entropy
from megatron_mtp.parallel.shape import RunShape
from megatron_mtp.recipes import get_recipe

TOKENS, HIDDEN, ROWS, VOCAB = 37, 12, 64, 59
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


Z_LOSS = 0.3


def _inputs(masked: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, targets and token weights: 0 for every token but one in `masked`."""
    torch.manual_seed(3)
    counts = torch.arange(TOKENS) % masked == 0 if masked else torch.ones(TOKENS)
    return (
        torch.randn(TOKENS, HIDDEN),
        torch.randn(ROWS, HIDDEN),
        torch.randint(0, VOCAB, (TOKENS,)),
        torch.rand(TOKENS) * counts,
    )


def _reference(masked: int = 0) -> tuple[torch.Tensor, ...]:
    hidden, weight, targets, token_weights = _inputs(masked)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight[:VOCAB].T
    loss, lse = F.cross_entropy(logits, targets, reduction="none"), logits.logsumexp(1)
    total = (token_weights * (loss + Z_LOSS * lse.square())).sum()
    total.backward()
    return loss.detach(), total.detach(), logits.argmax(1), hidden.grad, weight.grad


def _ours(
    weight: torch.Tensor, group: dist.ProcessGroup | None, chunk: int, masked: int = 0, incoming: float = 1.0
) -> tuple[torch.Tensor, ...]:
    hidden, _, targets, token_weights = _inputs(masked)
    hidden, weight = hidden.requires_grad_(), weight.clone().requires_grad_()
    shard = VocabShard.of(weight, VOCAB, group)
    total, loss, top1 = chunked_cross_entropy(hidden, weight, targets, token_weights, shard, chunk, Z_LOSS, 8.0)
    (incoming * total).backward()
    return loss, total.detach(), top1, hidden.grad / incoming, weight.grad / incoming


def _assert_close(ours: tuple[torch.Tensor, ...], reference: tuple[torch.Tensor, ...]) -> None:
    assert torch.equal(ours[2], reference[2])
    for mine, theirs in zip((*ours[:2], *ours[3:]), (*reference[:2], *reference[3:]), strict=True):
        assert (mine.double() - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.mark.unit
@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 64])
@pytest.mark.parametrize("incoming", [8.0, 1.0, 1024.0])
def test_equals_whole_logits_in_fp64_for_any_chunk_and_incoming_gradient(chunk: int, incoming: float):
    _assert_close(_ours(_inputs()[1], None, chunk, incoming=incoming), _reference())


@pytest.mark.unit
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("masked", [2, 5, TOKENS])
def test_tokens_without_weight_are_left_out_of_the_backward_pass(masked: int, chunk: int):
    ours = _ours(_inputs()[1], None, chunk, masked)
    _assert_close(ours, _reference(masked))
    assert ours[3].abs().sum(1).nonzero().squeeze(1).tolist() == list(range(0, TOKENS, masked))


@pytest.mark.unit
def test_padding_rows_take_no_part():
    weight = _inputs()[1]
    weight[VOCAB:] = 100.0  # would win every softmax
    _assert_close(_ours(weight, None, 7)[:3] + _reference()[3:], _reference())
    assert _ours(weight, None, 7)[4][VOCAB:].abs().max() == 0


@pytest.mark.unit
def test_a_frozen_weight_gets_no_gradient_and_the_hidden_state_still_does():
    hidden, weight, targets, token_weights = _inputs()
    hidden.requires_grad_()
    shard = VocabShard.of(weight, VOCAB, None)
    chunked_cross_entropy(hidden, weight, targets, token_weights, shard, 7, Z_LOSS).total.backward()
    assert (hidden.grad.double() - _reference()[3]).norm() <= 2e-6 * _reference()[3].norm()
    assert weight.grad is None


@pytest.mark.unit
def test_without_gradients_only_the_logits_are_computed():
    hidden, weight, targets, token_weights = _inputs()
    shard = VocabShard.of(weight, VOCAB, None)
    for want_gradient in (False, True):
        with torch.no_grad(), _Products() as products:
            hidden.requires_grad_(want_gradient)
            found = chunked_cross_entropy(hidden, weight, targets, token_weights, shard, 7)
        assert not found.total.requires_grad
        assert products.multiplications == TOKENS * HIDDEN * VOCAB


def _sharded(chunk: int) -> tuple[torch.Tensor, ...]:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    weight = _inputs()[1].chunk(size)[rank]
    return _ours(weight, group, chunk)


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
def test_vocabulary_shards_equal_whole_logits(ranks, size: int):
    # With four shards the last one holds padding rows too.
    results = ranks(size).run(_sharded, 7)
    hidden_grad = torch.stack([result[3] for result in results]).sum(0)
    weight_grad = torch.cat([result[4] for result in results])
    for loss, total, top1, *_ in results:
        _assert_close((loss, total, top1, hidden_grad, weight_grad), _reference())


@pytest.mark.unit
def test_ties_between_shards_go_to_the_smallest_id():
    hidden, weight = torch.ones(1, 2), torch.zeros(8, 2)
    weight[[3, 6]] = 1.0
    shard = VocabShard.of(weight, 8, None)
    _, _, top1 = chunked_cross_entropy(hidden, weight, torch.tensor([0]), torch.ones(1), shard, 1)
    assert top1.tolist() == [3]


class _Products(TorchDispatchMode):
    """Counts the multiplications of matrix products, and the most bytes of tensors [., VOCABULARY] alive at once."""

    def __init__(self, vocabulary: int = -1):
        super().__init__()
        self.vocabulary, self.multiplications, self.alive, self.most = vocabulary, 0, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        for out in result if isinstance(result, (tuple, list)) else [result]:
            is_weight = function.overloadpacket is torch.ops.aten.t
            if isinstance(out, torch.Tensor) and out.shape[1:] == (self.vocabulary,) and not is_weight:
                storage = out.untyped_storage()
                self.alive[storage.data_ptr()] = (weakref.ref(storage), storage.nbytes())
        self.alive = {key: value for key, value in self.alive.items() if value[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def _step(tokens: int, vocab: int, chunk: int, dtype: torch.dtype = torch.float32) -> _Products:
    hidden = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 8, dtype=dtype, requires_grad=True)
    targets, shard = torch.randint(0, vocab, (tokens,)), VocabShard.of(weight, vocab, None)
    with _Products(vocab) as products:
        chunked_cross_entropy(hidden, weight, targets, torch.rand(tokens), shard, chunk).total.backward()
    return products


@pytest.mark.unit
def test_three_products_make_loss_and_gradients():
    assert _step(300, 500, 64).multiplications == 3 * 300 * 500 * 8


def _sharded_products() -> int:
    size, rank = dist.get_world_size(), dist.get_rank()
    hidden, weight, targets, token_weights = _inputs()
    weight = weight.chunk(size)[rank].requires_grad_()
    shard = VocabShard.of(weight, VOCAB, dist.group.WORLD)
    with _Products() as products:
        chunked_cross_entropy(hidden.requires_grad_(), weight, targets, token_weights, shard, 7).total.backward()
    return products.multiplications


@pytest.mark.dist
def test_three_products_with_vocabulary_shards(ranks):
    assert sum(ranks(2).run(_sharded_products)) == 3 * TOKENS * HIDDEN * VOCAB


@pytest.mark.unit
@pytest.mark.parametrize("vocab", [32768, 151936])
@pytest.mark.parametrize("seq_length", [2048, 4096])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_take_a_quarter_of_one_depths_at_the_default(dtype, seq_length, vocab):
    cfg = get_recipe("tiny_dense")
    cfg.model.update(seq_length=seq_length, vocab_size=vocab)
    cfg.train.micro_batch_size = 1
    cfg.precision.dtype = dtype
    chunk = RunShape.of(cfg.finalize(1)).logits_chunk_tokens
    # A fraction of the vocabulary: the parts are proportional to it.
    for depths in (1, 4):
        most = _step((1 + depths) * seq_length, 2048, chunk, DTYPES[dtype]).most
        assert 0 < most <= 0.25 * seq_length * 2048 * 4


@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 300),
    levels=st.integers(1, 5),
    seed=st.integers(0, 99),
    nan=st.booleans(),
)
def test_the_largest_logit_is_the_one_that_torch_finds(rows, width, levels, seed, nan):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, levels, (rows, width), generator=generator).float()  # ties are frequent
    if nan:
        logits[0, seed % width] = torch.nan
    high, first = cross_entropy._max_and_first(logits)
    expected = logits.max(dim=1)
    assert torch.equal(first, expected.indices)
    assert torch.equal(high.nan_to_num(-1), expected.values.nan_to_num(-1))
