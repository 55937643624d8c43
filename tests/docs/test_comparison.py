"""The comparison in README and its evidence in docs/comparison.md say the same, cell by cell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]


def tables(page: str) -> dict[str, list[list[str]]]:
    """Heading -> rows of the table below it, the head first."""
    found: dict[str, list[list[str]]] = {}
    heading, previous = "", ""
    for token in MarkdownIt().enable("table").parse((ROOT / page).read_text(encoding="utf-8")):
        if token.type == "inline" and previous == "heading_open":
            heading = token.content
        elif token.type == "tr_open":
            found.setdefault(heading, []).append([])
        elif token.type == "inline" and previous in ("th_open", "td_open"):
            found[heading][-1].append(token.content)
        previous = token.type
    return found


def test_every_cell_has_its_evidence():
    head, *rows = tables("README.md")["Comparison with other systems"]
    evidence = tables("docs/comparison.md")
    assert [row[0].lower() for row in rows] == [heading.lower() for heading in evidence]
    for row, (_, *sources) in zip(rows, evidence.values(), strict=True):
        assert dict(zip(head[1:], row[1:], strict=True)) == {system: cell for system, cell, *_ in sources}


def test_every_system_is_read_at_a_commit():
    for _, *sources in tables("docs/comparison.md").values():
        for system, _, commit, file, said in sources:
            assert commit == "-" if system == "here" else re.fullmatch("[0-9a-f]{12}", commit)
            assert file
            assert said
