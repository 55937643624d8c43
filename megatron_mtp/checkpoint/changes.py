"""What a resume says of a changed config beside what `compat` reports: the learning rate, and fields without effect."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from megatron_mtp.checkpoint.compat import same
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.knob import resume_rule
from megatron_mtp.config.schedules import learning_rate
from megatron_mtp.config.sections import section_types
from megatron_mtp.config.timeline import ScheduleClock, Timeline
from megatron_mtp.errors import ConfigError, shown


def rate_change(saved: dict[str, Any], cfg: ConfigContainer, consumed_samples: int) -> str | None:
    """The learning rate of the next step by both configs, of runs without phases; None: it is the same.

    Args:
        saved: config in the checkpoint, as plain data.
        cfg: finalized.
        consumed_samples: of the checkpoint.
    """
    try:
        before = _rate(ConfigContainer.from_dict(saved), consumed_samples)
    except ConfigError:  # another version wrote it; its fields have been compared, and this line is for information
        return None
    now = _rate(cfg, consumed_samples)
    if math.isclose(before, now, rel_tol=1e-6):
        return None
    return f"the learning rate of the next step is {now:.4g}; by the checkpoint's config it would be {before:.4g}"


def phase_changes(saved: dict[str, Any] | None, present: dict[str, Any], names: Iterable[str]) -> dict[str, list[Any]]:
    """ "section.field" -> [before, now] of what a phase changes.

    Args:
        saved: config of the checkpoint with which it begins, as plain data; None: it begins with the run.
        present: of the phase.
        names: fields that it sets, as "section.field".
    """
    found = {}
    for field in names if saved is not None else ():
        section, name = field.split(".", 1)
        before, now = (saved or {}).get(section, {}).get(name), present[section][name]
        if not same(section, name, before, now):
            found[field] = [before, now]
    return found


def _rate(cfg: ConfigContainer, consumed_samples: int) -> float:
    return learning_rate(cfg, ScheduleClock(Timeline.of(cfg), 0))(consumed_samples)


def free_changes(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """ "section.field: old -> new" of every changed field that a resume may change without effect on the curve.

    Args:
        saved, present: resolved configs as plain data. Fields that either lacks are left out.
    """
    return [
        f"{section}.{name} {shown(saved[section][name])} -> {shown(value)}"
        for section, kind in section_types().items()
        for name, value in present[section].items()
        if resume_rule(kind, name) == "free"
        and name in saved.get(section, {})
        and not same(section, name, saved[section][name], value)
    ]
