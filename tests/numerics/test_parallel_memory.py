"""Parallel heads hold the activations of one depth at a time: live bytes in a forward and backward pass."""

from __future__ import annotations

import weakref
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.harness.runs import masked_step

pytestmark = pytest.mark.dist

# Wide and long enough for activations to outweigh everything else, one trunk layer.
SIZE = (
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.ffn_hidden_size=256",
    "model.seq_length=256",
    "model.vocab_size=96",
    "model.mtp_variant=parallel",
    "train.micro_batch_size=1",
    "train.global_batch_size=1",
)
UNIT = 256 * 64 * 4
"""Bytes of one hidden state of the sequence."""


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made while it is active and not yet freed, and the largest value so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(num_depths: int) -> int:
    """Of one micro-batch's forward and backward pass, weights and gradient buffers left out."""
    from megatron_mtp.training.step import Engine

    live, real = LiveBytes(), Engine.forward_backward

    def watched(self, batch, loss_factor):
        real(self, batch, loss_factor)  # buffers made at first use are made
        with live:
            return real(self, batch, loss_factor)

    with mock.patch.object(Engine, "forward_backward", watched):
        masked_step("tiny_dense", (*SIZE, f"model.mtp_num_layers={num_depths}"), torch.ones(1, 256))
    return live.peak


def test_four_depths_hold_one_depths_activations(ranks):
    """In hidden states: 98.6 at D = 1 and 126.6 at D = 4; 236.6 if the activations of all depths were held.

    Each depth keeps its state at the head: the layer's output, the stack of states, and their gradients.
    """
    one, four = (ranks(1).run(peak_bytes, depths)[0] for depths in (1, 4))
    assert four - one < 3 * 12 * UNIT, (one / UNIT, four / UNIT)
