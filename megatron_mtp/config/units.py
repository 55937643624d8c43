"""Sizes in bytes that several packages use."""

from __future__ import annotations

GIB = 2**30
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one number, by `precision.dtype`."""
