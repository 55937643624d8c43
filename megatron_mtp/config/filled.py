"""For values that are None only where their reader is never called, such as fields that `finalize` fills."""

from __future__ import annotations


def filled[T](value: T | None) -> T:
    """`value`, which is not None here; a type checker then knows it."""
    assert value is not None, "it is filled before this is called: is the config finalized?"
    return value
