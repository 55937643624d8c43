"""A sample as a person reads it: its text, and what each depth predicts and which targets count.

Everything is read from the micro-batch that training would make of the sample.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TextIO

import torch

from megatron_mtp.config.depths import loss_names
from megatron_mtp.data.batch import MicroBatch
from megatron_mtp.data.shift import segments
from megatron_mtp.data.source import Sample

WIDTH = 80
DIM, RESET = "\x1b[2m", "\x1b[0m"
END = "--- end of document ---"
Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Marks:
    """What stands around targets without a loss."""

    before: str
    after: str

    @classmethod
    def of(cls, stream: TextIO) -> Marks:
        """Grey text in a terminal with colours; signs elsewhere, and where NO_COLOR is set (no-color.org)."""
        has_colours = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return cls(DIM, RESET) if has_colours else cls("[-", "-]")

    def around(self, text: str) -> str:
        """`text`, marked."""
        return f"{self.before}{text}{self.after}"


def header(sample: Sample, batch: MicroBatch, origin: str) -> list[str]:
    """Where a sample comes from, and how many targets of each depth count."""
    num_documents = 1 + int(segments(sample.starts)[-1])
    counts = (batch.loss_mask != 0).sum(dim=(1, 2)).tolist()
    depths = ", ".join(f"{name.removesuffix(' loss')} {n}" for name, n in zip(names(batch), counts, strict=True))
    slots = batch.tokens.shape[-1]
    documents = f"part{'s' * (num_documents > 1)} of {num_documents} document{'s' * (num_documents > 1)}"
    return [f"{origin}: {len(sample.tokens)} tokens, {documents}", f"targets that count, of {slots} slots: {depths}"]


def names(batch: MicroBatch) -> list[str]:
    """The losses of its depths."""
    return loss_names(len(batch.labels) - 1)


def as_text(sample: Sample, batch: MicroBatch, decode: Decode, marks: Marks) -> str:
    """The text of a sample; tokens that are no target of the main prediction are marked. Ends of documents get a line.

    The first token is read only.
    """
    is_target = [False, *(batch.loss_mask[0, 0] != 0).tolist()]
    parts = []
    document = segments(sample.starts).tolist()
    for number, group in groupby(range(len(document)), document.__getitem__):
        if number:
            parts.append(f"\n{END}\n")
        for counts, run in groupby(group, is_target.__getitem__):
            text = printable(decode(sample.tokens[list(run)].tolist()))
            parts.append(text if counts else marks.around(text))
    return "".join(parts)


def as_table(sample: Sample, batch: MicroBatch, decode: Decode, marks: Marks) -> Iterator[str]:
    """One line for each slot: the token that it reads and the target of each depth; those without a loss are marked.

    A point stands where the target lies beyond the sample.
    """
    depths = len(batch.labels)
    room = max(6, (WIDTH - 6) // (depths + 1) - 2)
    cells = [f"{name.removesuffix(' loss'):<{room}}" for name in names(batch)]
    yield "  ".join([f"{'slot':>4}", f"{'reads':<{room}}", *cells]).rstrip()
    length = batch.tokens.shape[-1]
    for slot in range(length):
        row = [f"{slot:>4}", _cell(decode, batch.tokens[0, slot], room)]
        for depth in range(depths):
            if slot + depth + 1 > length:
                row.append(f"{'.':<{room}}")
                continue
            label, counts = batch.labels[depth, 0, slot], bool(batch.loss_mask[depth, 0, slot])
            row.append(_cell(decode, label, room) if counts else _marked(decode, label, room, marks))
        yield "  ".join(row).rstrip()
        if sample.starts[slot + 1]:
            yield f"      {END}"


def _cell(decode: Decode, token: torch.Tensor, room: int) -> str:
    return f"{_short(decode, token, room):<{room}}"


def _marked(decode: Decode, token: torch.Tensor, room: int, marks: Marks) -> str:
    """The text between marks; those that print take their room from it."""
    shown = 0 if marks.before == DIM else len(marks.before) + len(marks.after)
    text = _short(decode, token, room - shown)
    return marks.around(text) + " " * (room - shown - len(text))


def _short(decode: Decode, token: torch.Tensor, room: int) -> str:
    text = repr(printable(decode([int(token)])))
    return text if len(text) <= room else f"{text[: room - 1]}~"


def printable(text: str) -> str:
    """Text that leaves a terminal as it is: control characters other than line ends and tabs are written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
