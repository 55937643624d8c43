"""Random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_mtp.config.base import Section


@dataclass(kw_only=True, slots=True)
class RNGConfig(Section):
    """Random numbers."""

    SECTION: ClassVar[str] = "rng"

    seed: int = 1234
    """Initial weights, data order and dropout follow from it."""
