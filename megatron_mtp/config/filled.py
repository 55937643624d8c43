"""For fields that may be None until `finalize` fills them."""

from __future__ import annotations


def filled[T](value: T | None) -> T:
    """The value of such a field in a finalized config, for a reader that needs its type without None."""
    assert value is not None, "the config is not finalized"
    return value
