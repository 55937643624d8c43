"""Current and peak memory of tensors, on any device."""

from __future__ import annotations

import resource
import sys
import weakref
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryMeter(Protocol):
    """Counts bytes of tensors while it is active as a context manager."""

    @property
    def now_bytes(self) -> int:
        """Bytes held now."""

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes held at once since the start or the last `reset_peak`."""

    def reset_peak(self) -> None:
        """Sets the peak to the bytes held now."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: Any) -> None: ...


def memory_meter(device: torch.device) -> MemoryMeter:
    """The meter for a device: live tensor storage on a CPU, the allocator's counters on a GPU."""
    return AllocatorMeter(device) if device.type == "cuda" else LiveStorage()


def peak_resident_bytes() -> int:
    """Peak resident set of this process, with libraries, Python's objects and freed memory that was kept.

    On Linux `ru_maxrss` is no less than the peak of the process that started this one, so the kernel's own mark of this
    address space is read where there is one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class LiveStorage(TorchDispatchMode):
    """Bytes of the storages made by operations of this thread while it is active and not yet freed.

    A storage that several tensors share counts once. Scratch space inside one operation is not counted, nor are tensors
    of other threads or numpy. Each operation takes some microseconds longer: do not measure times meanwhile.
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
    """Memory that the caching allocator of a GPU gave to tensors, without its cache."""

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
        """The counters stay readable."""
