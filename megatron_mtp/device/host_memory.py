"""Keeps the memory that a step on a CPU frees, for the next step.

By default glibc asks the kernel for each large block and gives it back when it is freed, so a step meets every page of
its activations as a new one: a page fault, and zeros written by the kernel. Each training step allocates the same
blocks, so kept memory serves it again: `docs/performance.md` has the figures.
"""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt's parameters, of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_USERS_OWN = ("mmap_max", "mmap_threshold", "trim_threshold")


def keep_freed_memory() -> bool:
    """From now on large blocks of this process come from its heap, and the heap does not shrink by itself.

    Returns:
        Whether it is so: not if the environment sets these parameters of glibc, and not with another C library.
    """
    if _is_set_by_the_user() or (libc := _glibc()) is None:
        return False
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Gives the kernel what was freed and kept."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _is_set_by_the_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(f"glibc.malloc.{name}=" in tunables or f"MALLOC_{name.upper()}_" in os.environ for name in _USERS_OWN)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
