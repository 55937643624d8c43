"""What a conversion did with every tensor. Imports neither torch nor megatron."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(slots=True)
class Report:
    """Every tensor on either side is in one of these lists.

    Args:
        source, target: folders.
        family: form of the Hugging Face side.
        read: tensors that were read, under the source's names.
        written: tensors that were written, under the target's names; several may come from one, and one from several.
        tied: weights that are not stored because they are another tensor.
        duplicated: copies that one side holds on purpose, checked to hold the same bits or written so.
        padded: tensors of ours with rows of padding, which are zero and not exported.
        made: tensors that the source lacks and that were made: new MTP layers.
        left_out: what was not carried, because the caller asked for that or because it is no weight, with the reason.
        files: tokenizer, config and other files that were written.
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

    def to_json(self, path: Path) -> None:
        """All lists, for programs."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def lines(self) -> list[str]:
        """For people: counts, and by name whatever is neither read nor written as it is."""
        text = [f"{self.family}: {len(self.read)} tensors read, {len(self.written)} written to {self.target}"]
        for title, names in (
            ("tied, not stored", self.tied),
            ("duplicates on purpose", self.duplicated),
            ("padded with zeros", self.padded),
            ("made anew", self.made),
            ("left out", self.left_out),
            ("files", self.files),
        ):
            if names:
                text.append(f"{title} ({len(names)}): {_some(names)}")
        return text


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
