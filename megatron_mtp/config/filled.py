"""For optional values that are there whenever they are read, such as the experts' fields in a model with experts.

A field that `finalize` fills in every config is `Derived` (config/knob.py) and needs no `filled`.
"""

from __future__ import annotations


def filled[T](value: T | None) -> T:
    """`value`, which is not None here; a type checker then knows it."""
    assert value is not None, "it is filled before this is called: is the config finalized?"
    return value
