"""What a conversion did with every tensor. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(slots=True)
class Report:
    """Every tensor on either side is in one of these lists.

    Args:
        source, target: folders.
        family: family of the Hugging Face side.
        read: tensors that were read, by the source's names.
        written: tensors that were written, by the target's names; several may come from one, and one from several.
        tied: weights that are not stored because they are tied to another tensor.
        duplicated: intended copies of another tensor, with the same bits.
        padded: tensors of ours with rows of padding, which are zero and not exported.
        made: initialised tensors that the source lacks: new MTP layers.
        left_out: what was not converted, because the caller asked for it or because it is no weight.
        files: tokenizer, config and other files that were written.
        notes: what the caller should know about the result, in sentences.
    """

    source: str
    target: str
    family: str
    read: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self, path: Path) -> None:
        """Writes all lists, for programs."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def lines(self) -> list[str]:
        """For people: counts, and the names of all tensors that were not simply read or written."""
        text = [f"{self.family}: {len(self.read)} tensors read, {len(self.written)} written to {self.target}"]
        for title, names in (
            ("tied, not stored", self.tied),
            ("intended duplicates", self.duplicated),
            ("padded with zeros", self.padded),
            ("initialised", self.made),
            ("left out", self.left_out),
            ("files", self.files),
        ):
            if names:
                text.append(f"{title} ({len(names)}): {_some(names)}")
        return text + self.notes


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
