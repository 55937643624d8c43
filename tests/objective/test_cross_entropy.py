"""Chunked cross entropy against whole logits in fp64, alone and with the vocabulary in shards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_mtp.objective.cross_entropy import VocabShard, chunked_cross_entropy

TOKENS, HIDDEN, ROWS, VOCAB = 37, 12, 64, 59


def _inputs(masked: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, targets, and the weight of each token's loss and log-sum-exp: 0 for every token but one in
    `masked`.
    """
    torch.manual_seed(3)
    counts = torch.arange(TOKENS) % masked == 0 if masked else torch.ones(TOKENS)
    return (
        torch.randn(TOKENS, HIDDEN),
        torch.randn(ROWS, HIDDEN),
        torch.randint(0, VOCAB, (TOKENS,)),
        torch.rand(TOKENS) * counts,
        torch.rand(TOKENS) * counts,
    )


def _reference(masked: int = 0) -> tuple[torch.Tensor, ...]:
    hidden, weight, targets, of_loss, of_lse = _inputs(masked)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight[:VOCAB].T
    loss, lse = F.cross_entropy(logits, targets, reduction="none"), logits.logsumexp(1)
    ((loss * of_loss).sum() + (lse.square() * of_lse).sum()).backward()
    return loss.detach(), lse.detach(), logits.argmax(1), hidden.grad, weight.grad


def _ours(
    weight: torch.Tensor, group: dist.ProcessGroup | None, chunk: int, masked: int = 0
) -> tuple[torch.Tensor, ...]:
    hidden, _, targets, of_loss, of_lse = _inputs(masked)
    hidden, weight = hidden.requires_grad_(), weight.clone().requires_grad_()
    shard = VocabShard.of(weight, VOCAB, group)
    loss, lse, top1 = chunked_cross_entropy(hidden, weight, targets, shard, chunk)
    ((loss * of_loss).sum() + (lse.square() * of_lse).sum()).backward()
    return loss.detach(), lse.detach(), top1, hidden.grad, weight.grad


def _assert_close(ours: tuple[torch.Tensor, ...], reference: tuple[torch.Tensor, ...]) -> None:
    assert torch.equal(ours[2], reference[2])
    for mine, theirs in zip((*ours[:2], *ours[3:]), (*reference[:2], *reference[3:]), strict=True):
        assert (mine.double() - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.mark.unit
@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 64])
def test_equals_whole_logits_in_fp64_for_any_chunk(chunk: int):
    _assert_close(_ours(_inputs()[1], None, chunk), _reference())


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
    hidden, weight, targets, *_ = _inputs()
    hidden.requires_grad_()
    loss, _, _ = chunked_cross_entropy(hidden, weight, targets, VocabShard.of(weight, VOCAB, None), 7)
    loss.sum().backward()
    assert hidden.grad.abs().max() > 0
    assert weight.grad is None


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
    for loss, lse, top1, *_ in results:
        _assert_close((loss, lse, top1, hidden_grad, weight_grad), _reference())


@pytest.mark.unit
def test_ties_between_shards_go_to_the_smallest_id():
    hidden, weight = torch.ones(1, 2), torch.zeros(8, 2)
    weight[[3, 6]] = 1.0
    _, _, top1 = chunked_cross_entropy(hidden, weight, torch.tensor([0]), VocabShard.of(weight, 8, None), 1)
    assert top1.tolist() == [3]


def _bytes_of_logits(depths: int) -> int:
    """Largest tensor of vocabulary width that exists during forward and backward, in bytes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for out in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 4096:
                    largest = max(largest, out.untyped_storage().nbytes())
            return result

    tokens, vocab = 512, 4096
    hidden = torch.randn((1 + depths) * tokens, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    targets = torch.randint(0, vocab, ((1 + depths) * tokens,))
    with Watch():
        loss, *_ = chunked_cross_entropy(hidden, weight, targets, VocabShard.of(weight, vocab, None), 64)
        loss.sum().backward()
    return largest


@pytest.mark.unit
def test_bytes_of_logits_do_not_grow_with_depth():
    one, four = _bytes_of_logits(1), _bytes_of_logits(4)
    assert 0 < four < 1.05 * one
    assert one < 0.25 * 512 * 4096 * 4
