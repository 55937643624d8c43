"""How much memory tensors take, now and at most, on any device."""

from __future__ import annotations

import resource
import sys
import weakref
from typing import Any, Protocol, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryMeter(Protocol):
    """Counts bytes of tensors while it is active as a context manager."""

    @property
    def now_bytes(self) -> int:
        """Held at this moment."""

    @property
    def peak_bytes(self) -> int:
        """Most that was held at once since the beginning or the last `reset_peak`."""

    def reset_peak(self) -> None:
        """The peak starts again at what is held now."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: Any) -> None: ...


def memory_meter(device: torch.device) -> MemoryMeter:
    """The meter for a device: live tensor storage on a CPU, the allocator's figures on a GPU."""
    return AllocatorMeter(device) if device.type == "cuda" else LiveStorage()


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far: libraries, Python's objects and freed memory that was kept included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class LiveStorage(TorchDispatchMode):
    """Bytes of the storages made by operations of this thread while it is active and not yet freed.

    A storage that several tensors share counts once. Scratch space inside one operation is not seen, nor are tensors that
    other threads or numpy made. Each operation costs some microseconds more: nothing is to be timed meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = self._peak = 0
        self._known: dict[int, int] = {}

    @property
    def now_bytes(self) -> int:
        """See MemoryMeter."""
        return self._now

    @property
    def peak_bytes(self) -> int:
        """See MemoryMeter."""
        return self._peak

    def reset_peak(self) -> None:
        """See MemoryMeter."""
        self._peak = self._now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is None:
            # The Python object of a storage lives as long as the storage itself.
            weakref.finalize(storage, self._forget, key)
        if known != size:  # new, or resized: recomputation without outputs empties storages and fills them again
            self._known[key] = size
            self._now += size - (known or 0)
            self._peak = max(self._peak, self._now)

    def _forget(self, key: int) -> None:
        self._now -= self._known.pop(key, 0)


class AllocatorMeter:
    """What the caching allocator of a GPU handed out to tensors, without what it keeps for later."""

    def __init__(self, device: torch.device):
        self._device = device

    @property
    def now_bytes(self) -> int:
        """See MemoryMeter."""
        return torch.cuda.memory_allocated(self._device)

    @property
    def peak_bytes(self) -> int:
        """See MemoryMeter."""
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        """See MemoryMeter."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def __enter__(self) -> Self:
        self.reset_peak()
        return self

    def __exit__(self, *_: Any) -> None:
        """The figures stay readable."""
