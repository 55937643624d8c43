"""The files and folders that a run reads and writes, as its config names them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_mtp.config.blend import parse_blend
from megatron_mtp.config.knob import is_path, is_scratch, is_written
from megatron_mtp.config.phase_configs import phase_configs
from megatron_mtp.config.sections import DatasetConfig, RunConfig, section_types
from megatron_mtp.storage.address import is_address

DATA_ENDINGS = (".bin", ".idx")


@dataclass(frozen=True, slots=True)
class RunPath:
    """One path of a config.

    Args:
        field: "section.field" that names it.
        path: as the field says it; of data, the prefix.
        is_written: the run writes there.
        is_scratch: what it writes may be lost with the machine.
        endings: the files at `path` end with these; ("",): the path itself.
    """

    field: str
    path: str
    is_written: bool = False
    is_scratch: bool = False
    endings: tuple[str, ...] = ("",)

    def missing(self, path: str | None = None) -> list[str]:
        """The files that this machine does not see; none of an address.

        Args:
            path: where this machine has it; None: under the same path.
        """
        place = self.path if path is None else path
        whole = re.sub(r"@([0-9]+|best|latest)$", "", place)  # RUN@best is in RUN
        return [
            f"{place}{end}"
            for end in self.endings
            if not is_address(place) and not (Path(f"{place}{end}").exists() or Path(whole + end).exists())
        ]


def run_paths(cfg: RunConfig) -> list[RunPath]:
    """Every path of a finalized config, those of its phases too, each once for each field."""
    found: list[RunPath] = []
    for one in (cfg, *(present for _, present in phase_configs(cfg))):
        found += _data_paths(one.dataset, has_validation=bool(one.validation.eval_iters))
    for owner in section_types():
        section = getattr(cfg, owner)
        for field in fields(section):
            value = getattr(section, field.name)
            if isinstance(value, str) and is_path(type(section), field.name) and field.name != "loss_mask_suffix":
                name = f"{section.SECTION}.{field.name}"
                kind, key = type(section), field.name
                found.append(RunPath(name, value, is_written(kind, key), is_scratch(kind, key)))
    return list(dict.fromkeys(found))


def _data_paths(dataset: DatasetConfig, *, has_validation: bool) -> Iterator[RunPath]:
    """The prefixes of the blends."""
    blends: list[tuple[str, Any]] = [("dataset.blend", dataset.blend)]
    blends += [("dataset.blend_per_split", blend) for blend in dataset.blend_per_split or []]
    if has_validation:
        blends += [("dataset.valid_sets", blend) for blend in (dataset.valid_sets or {}).values()]
    masks = () if dataset.loss_mask_suffix is None else tuple(dataset.loss_mask_suffix + end for end in DATA_ENDINGS)
    endings = DATA_ENDINGS + masks
    for field, blend in blends:
        for prefix in () if blend is None else parse_blend(blend).prefixes:
            yield RunPath(field, prefix, endings=endings)
