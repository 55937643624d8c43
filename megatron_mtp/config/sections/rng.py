"""Random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import knob


@dataclass(kw_only=True, slots=True)
class RNGConfig(Section):
    """Random numbers."""

    SECTION: ClassVar[str] = "rng"

    seed: int = knob(1234, ge=0, lt=2**32)
    """Initial weights, data order and dropout follow from it."""
