"""Measures layouts of the models in models.py and compares them with one rank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.verify.placements import Placement
from tests.layouts.models import MODELS, batch_spec

if TYPE_CHECKING:
    from megatron_mtp.verify.compare import Difference  # imports megatron, which takes seconds

Change = Callable[[ConfigContainer], None]


@pytest.fixture(scope="session")
def measured(ranks):
    """A function from a layout ("": one rank, kept) and a model to the layout's Measurement."""
    from megatron_mtp.verify.measure import measure

    def run(layout: str, model: str, mask: str, change: Change | None, curve_steps: int):
        cfg = MODELS[model]()
        cfg.dataset.reset_attention_mask = mask == "documents"
        if change is not None:
            change(cfg)
        parsed = Placement.parse(layout)
        placed = parsed.apply(cfg)
        return ranks(parsed.world_size(placed)).run(measure, placed, batch_spec(placed, mask), curve_steps)[0]

    kept = functools.cache(run)
    return lambda layout, *case: (run if layout else kept)(layout, *case)


@pytest.fixture(scope="session")
def compared(measured):
    """A function from a model and a layout to the layout's difference from one rank."""
    from megatron_mtp.verify.compare import compare

    def difference(
        model: str, layout: str, mask: str = "holes", change: Change | None = None, curve_steps: int = 0
    ) -> Difference:
        """One layout against one rank; `change` alters the config of both, `curve_steps` are compared too."""
        case = (model, mask, change, curve_steps)
        return compare(measured(layout, *case), measured("", *case))

    return difference
