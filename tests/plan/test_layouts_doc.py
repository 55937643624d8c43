"""docs/published_layouts.md is what the planner says."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.layouts_doc import document

pytestmark = pytest.mark.unit


def test_the_page_is_the_planners():
    page = Path(__file__).parents[2] / "docs/published_layouts.md"
    again = "Write it again: python -m scripts.layouts_doc > docs/published_layouts.md"
    assert document() == page.read_text(encoding="utf-8"), again
