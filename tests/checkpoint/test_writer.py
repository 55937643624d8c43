from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_mtp.checkpoint.writer import HashedStream, _without_crc32, save_tensor
from megatron_mtp.mcore.kept_buffers import KeptBuffers

pytestmark = pytest.mark.unit


class Trickle(io.RawIOBase):
    """A file that takes at most 1000 bytes at a time, as a full pipe does."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = bytearray()

    def write(self, data) -> int:
        self.taken += bytes(data[:1000])
        return min(1000, len(data))


@pytest.mark.parametrize("with_thread", [False, True])
def test_all_bytes_arrive_and_are_hashed_in_order(with_thread: bool):
    raw, generator = Trickle(), torch.Generator().manual_seed(0)
    pieces = [torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for n in (10, 70_000, 0, 3, 200_000)]
    whole = b"".join(piece.numpy().tobytes() for piece in pieces)
    with ThreadPoolExecutor(1) as thread:
        stream = HashedStream(raw, thread if with_thread else None)
        assert [stream.write(piece.numpy()) for piece in pieces] == [len(piece) for piece in pieces]
    assert bytes(raw.taken) == whole
    assert stream.digest.hexdigest() == hashlib.sha256(whole).hexdigest()
    assert stream.position == len(whole)


def test_torch_reads_what_was_written_without_crc32(tmp_path: Path):
    tensor, before = torch.randn(300, 700), torch.serialization.get_crc32_options()
    with (tmp_path / "tensor").open("wb", buffering=0) as raw, _without_crc32():
        save_tensor(tensor, HashedStream(raw))
    assert torch.serialization.get_crc32_options() is before is True
    assert torch.equal(torch.load(tmp_path / "tensor", weights_only=True), tensor)


def test_kept_buffers_are_the_same_memory_for_the_same_save():
    buffers = KeptBuffers()
    orders = [((4, 3), torch.float32), ((4, 3), torch.float32), ((5,), torch.bfloat16)]
    buffers.start()
    first = [buffers.take(*order) for order in orders]
    assert len({tensor.data_ptr() for tensor in first}) == 3
    assert all(not tensor.any() for tensor in first)
    buffers.start()
    assert [buffers.take(*order).data_ptr() for order in orders] == [tensor.data_ptr() for tensor in first]
    buffers.start()
    changed = buffers.take((7,), torch.float32)
    assert changed.shape == (7,)
    assert buffers.take(*orders[1]).data_ptr() not in {tensor.data_ptr() for tensor in first}
