"""Problems of a config: made from a rule that names fields, so that they can be joined and filtered by field."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from megatron_mtp.config.base import Section
from megatron_mtp.errors import SHOWN_LENGTH, Problem, cut, shown

_PLACEHOLDER = re.compile(r"\{([a-z_]+)(?:\.(\w+)(=?))?\}")


def problem(section: Section, field: str, rule: str, remedy: str = "", **values: Any) -> Problem:
    """What is wrong with `field`, "section.field".

    In `rule`, `{model.num_layers}` stands for the name of a field and `{model.num_layers=}` for "model.num_layers = 4";
    both count among the problem's fields. In `rule` and `remedy`, `{size}` stands for the keyword argument `size`.

    Args:
        section: the one that holds all these fields, or the container of all sections.

    Example: problem(model, "model.num_layers", "must be above {model.mtp_num_layers=}") reads
    "model.num_layers = 2: must be above model.mtp_num_layers = 3."
    """
    fields = [field]

    def text(match: re.Match[str]) -> str:
        owner, name, with_value = match.groups()
        if name is None:
            return cut(str(values[owner]), 2 * SHOWN_LENGTH)
        full = f"{owner}.{name}"
        fields.append(full)
        return f"{full} = {shown(value_of(section, full))}" if with_value else full

    rule, remedy = _PLACEHOLDER.sub(text, rule), _PLACEHOLDER.sub(text, remedy)
    return Problem(fields=tuple(dict.fromkeys(fields)), value=value_of(section, field), rule=rule, remedy=remedy)


def refusal(section: Section, field: str, rule: str, remedy: str = "", **values: Any) -> Problem:
    """As `problem`, for a combination that is not supported, in contrast to a mistake."""
    return replace(problem(section, field, rule, remedy, **values), is_refusal=True)


def value_of(section: Section, field: str) -> Any:
    """The value of "section.field", or of an entry of a mapping: "model.mcore.softmax_scale"."""
    owner, name, *keys = field.split(".", 2)
    value = getattr(section if owner == section.SECTION else getattr(section, owner), name)
    return value[keys[0]] if keys else value
