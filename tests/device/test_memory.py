"""Live tensor storage, counted exactly."""

from __future__ import annotations

import pytest
import torch

from megatron_mtp.device.memory_meter import LiveStorage, memory_meter, peak_resident_bytes

pytestmark = pytest.mark.unit
KIB = 1024


def test_storages_count_once_and_leave_when_freed():
    with LiveStorage() as meter:
        first = torch.zeros(KIB, dtype=torch.uint8)
        view = first[10:].view(-1)
        second = torch.ones(2 * KIB, dtype=torch.uint8)
        assert meter.now_bytes == 3 * KIB
        del first
        assert meter.now_bytes == 3 * KIB, "a view keeps the storage"
        del view
        assert (meter.now_bytes, meter.peak_bytes) == (2 * KIB, 3 * KIB)
        meter.reset_peak()
        assert meter.peak_bytes == 2 * KIB
        del second
    assert meter.now_bytes == 0


def test_what_autograd_keeps_counts_until_the_backward_pass_is_done():
    weight = torch.ones(64, 64, requires_grad=True)  # made before: not counted
    unit = 16 * 64 * 4
    with memory_meter(torch.device("cpu")) as meter:
        hidden = torch.ones(16, 64)
        out = (hidden @ weight).exp().sum()
        assert meter.now_bytes == 2 * unit + 4, "input and exp's result are kept, the product is not"
        out.backward()
        del out
        assert meter.now_bytes == unit + 64 * 64 * 4, "input and gradient"
        assert meter.peak_bytes > 3 * unit


def test_a_resized_storage_is_counted_at_its_new_size():
    with LiveStorage() as meter:
        tensor = torch.zeros(KIB)
        tensor.untyped_storage().resize_(0)
        tensor.view(-1)
        assert meter.now_bytes == 0
        tensor.untyped_storage().resize_(4 * KIB)
        tensor.view(-1)
        assert meter.now_bytes == 4 * KIB


def test_a_storage_that_other_code_made_is_counted_when_it_is_met():
    with LiveStorage() as meter:
        tensor = torch.zeros(KIB)
    with meter:
        assert meter.now_bytes == 4 * KIB
        del tensor
    assert meter.now_bytes == 0


def test_resident_memory_covers_a_large_tensor():
    before = peak_resident_bytes()
    ballast = torch.ones(2**26, dtype=torch.uint8)
    assert before > 2**25
    assert peak_resident_bytes() >= max(before, ballast.numel())
