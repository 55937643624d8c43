"""One text of an input, whatever the format of its file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its line or row number, counted from 1."""

    line: int
    text: str
