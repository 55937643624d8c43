"""What a resume says of a changed config beside what `compat` reports: the learning rate, and fields without effect."""

from __future__ import annotations

import math
from typing import Any

from megatron_mtp.checkpoint.compat import same
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.coerce import field_types
from megatron_mtp.config.knob import resume_rule
from megatron_mtp.config.schedules import learning_rate
from megatron_mtp.errors import ConfigError, shown


def rate_change(saved: dict[str, Any], cfg: ConfigContainer, consumed_samples: int) -> str | None:
    """The learning rate of the next step by both configs; None: it is the same.

    Args:
        saved: config in the checkpoint, as plain data.
        cfg: finalized.
        consumed_samples: of the checkpoint.
    """
    try:
        before = learning_rate(ConfigContainer.from_dict(saved))(consumed_samples)
    except ConfigError:  # another version wrote it; its fields have been compared, and this line is for information
        return None
    now = learning_rate(cfg)(consumed_samples)
    if math.isclose(before, now, rel_tol=1e-6):
        return None
    return f"the learning rate of the next step is {now:.4g}; by the checkpoint's config it would be {before:.4g}"


def free_changes(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """ "section.field: old -> new" of every changed field that a resume may change without effect on the curve.

    Args:
        saved, present: resolved configs as plain data. Fields that either lacks are left out.
    """
    return [
        f"{section}.{name} {shown(saved[section][name])} -> {shown(value)}"
        for section, kind in field_types(ConfigContainer).items()
        for name, value in present[section].items()
        if resume_rule(kind, name) == "free"
        and name in saved.get(section, {})
        and not same(section, name, saved[section][name], value)
    ]
