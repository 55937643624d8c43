"""What is known about a config field, stated where the field is declared: range, path, way into Megatron-Core, resume.

    rotary_percent: float = knob(1.0, ge=0, le=1, mcore="mla")

The range checks of `finalize`, the fields that Megatron-Core's config receives, what a resume may change and
docs/config.md are all derived from these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

from megatron_mtp.storage.address import address_problem, is_address

Transfer = Literal["same", "mla", "moe", "own"]
"""How Megatron-Core's config gets the field. same: under its own name; mla, moe: the same, for such models only;
own: converted in model/transformer_config.py."""
Resume = Literal["free", "curve", "fixed"]
"""What may change when a run resumes. free: the run computes the same; curve: the loss curve changes from there on,
which is reported; fixed: resuming with another value is refused."""
PhaseRule = Literal["fixed", "free", "schedule", "batch", "data"]
"""What a phase of `cfg.phases` may do with a field. fixed: it may not set it; free: it may. A phase that sets one of
the others begins something of its own: schedule: learning rate and weight decay; batch: the growth of the global batch;
data: the order of the training data."""
INT64_MAX = 2**63 - 1
MAX_WIDTH = 10**7
"""Widths and numbers of heads."""
MAX_STEPS = 10**12
"""Steps, samples, and intervals in steps."""
MAX_TOKENS = 10**18
"""Tokens of a run."""
YEAR_MINUTES = 525_600
"""Durations."""
if TYPE_CHECKING:
    type Derived[T] = T
else:

    class Derived:
        """The type of a field that may be None until `finalize` fills it. To a type checker, it is never None."""

        def __class_getitem__(cls, kind: Any) -> Any:
            return kind | None


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a field accepts: all finite, integers within 64 bits. Items of a list or mapping are checked one
    by one.

    Args:
        gt, ge: lower bound, excluded or included.
        lt, le: upper bound, excluded or included.
    """

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def holds(self, value: Any) -> bool:
        """Whether every number in `value` is in the range; text, flags and None are not numbers."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self._holds(value)  # as most are: `finalize` asks for every field
        return all(map(self._holds, numbers(value)))

    def _holds(self, number: float) -> bool:
        return (
            _is_finite(number)
            and (self.gt is None or number > self.gt)
            and (self.ge is None or number >= self.ge)
            and (self.lt is None or number < self.lt)
            and (self.le is None or number <= self.le)
        )

    @property
    def lowest(self) -> float:
        """A number in the range, near its lower end."""
        if self.ge is not None:
            return self.ge
        return 1 if self.gt is None or self.gt < 1 else self.gt + 1

    def rule(self, value: Any) -> str:
        """What a value outside breaks, as a rule: "must be at least 0 and below 1"."""
        if not all(map(_is_finite, numbers(value))):
            return "must be finite and within 64 bits"
        bounds = [("above", self.gt), ("at least", self.ge), ("below", self.lt), ("at most", self.le)]
        return f"must be {' and '.join(f'{words} {_text(bound)}' for words, bound in bounds if bound is not None)}"

    def __str__(self) -> str:
        """As an interval: "[0, 1)"."""
        low = f"({_text(self.gt)}" if self.gt is not None else f"[{_text(self.ge)}" if self.ge is not None else "(-inf"
        high = f"{_text(self.lt)})" if self.lt is not None else f"{_text(self.le)}]" if self.le is not None else "inf)"
        return f"{low}, {high}"


def numbers(value: Any) -> Iterator[float]:
    """The numbers that a value of a field holds: itself, or the items of a list or mapping."""
    return (item for item in _items(value) if isinstance(item, int | float) and not isinstance(item, bool))


def _items(value: Any) -> Iterator[Any]:
    """A value, or what it holds at any depth."""
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _items(item)
    else:
        yield value


def _text(bound: float | None) -> str:
    return f"{bound:_}" if isinstance(bound, int) else f"{bound:g}"


def _is_finite(number: float) -> bool:
    return abs(number) <= INT64_MAX if isinstance(number, int) else math.isfinite(number)


def knob(
    default: Any,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    is_path: bool = False,
    is_written: bool = False,
    is_scratch: bool = False,
    may_be_address: bool = False,
    mcore: Transfer | None = None,
    resume: Resume | None = None,
    phase: PhaseRule | None = None,
) -> Any:
    """A field of a section with the facts about it; the string below the field says what it means.

    Args:
        default: a list or dict is copied for every new section.
        gt, ge, lt, le: its range, see `Range`.
        is_path: its texts, also in a list or mapping, name files or folders.
        is_written: the run writes to these paths; otherwise it only reads them.
        is_scratch: what it writes there may be lost with the machine.
        may_be_address: they may be addresses of object storage, such as s3://bucket/run.
        mcore: how Megatron-Core's config gets it; None: it does not.
        resume: None: as the section says.
        phase: what a phase may do with it; None: as the section says.
    """
    limits = None if gt is ge is lt is le is None else Range(gt, ge, lt, le)
    metadata: dict[str, Any] = {"range": limits, "is_path": is_path, "is_written": is_written, "mcore": mcore}
    metadata |= {"may_be_address": may_be_address, "resume": resume, "phase": phase}
    metadata |= {"is_scratch": is_scratch}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def range_of(section: type, name: str) -> Range | None:
    """The range of a field; None: it holds no number."""
    found: Range | None = _facts(section)[name].get("range")
    return found


def is_path(section: type, name: str) -> bool:
    """Whether the texts of a field name files or folders."""
    return bool(_facts(section)[name].get("is_path"))


def is_written(section: type, name: str) -> bool:
    """Whether the run writes to the paths of a field."""
    return bool(_facts(section)[name].get("is_written"))


def is_scratch(section: type, name: str) -> bool:
    """Whether what the run writes to the paths of a field may be lost with the machine."""
    return bool(_facts(section)[name].get("is_scratch"))


def may_be_address(section: type, name: str) -> bool:
    """Whether a field takes addresses of object storage."""
    return bool(_facts(section)[name].get("may_be_address"))


def broken_rule(section: type, name: str, value: Any) -> str | None:
    """The rule of the field's range or kind that `value` breaks."""
    limits = range_of(section, name) or Range()
    if not limits.holds(value):
        return limits.rule(value)
    if value is None or isinstance(value, int | float):
        return None  # holds no text
    texts = [item for item in _items(value) if isinstance(item, str)]
    if any("\0" in text for text in texts):
        return "must hold no NUL character"
    if is_path(section, name) and "" in texts:
        return "must not be empty; leave it unset, or name a file or folder"
    if is_path(section, name):
        is_accepted = may_be_address(section, name)
        problems = (address_problem(text, is_accepted=is_accepted) for text in texts if is_address(text))
        return next((problem for problem in problems if problem), None)
    return None


def resume_rule(section: type, name: str) -> Resume:
    """What a resume may do with a field. A field that no version knows any more follows the section's rule."""
    rule: Resume = _facts(section).get(name, {}).get("resume") or getattr(section, "RESUME")  # noqa: B009 -- `type` has none
    return rule


def phase_rule(section: type, name: str) -> PhaseRule:
    """What a phase may do with a field."""
    rule: PhaseRule = _facts(section)[name].get("phase") or getattr(section, "PHASE")  # noqa: B009 -- `type` has none
    return rule


def mcore_fields(section: type, kinds: Iterable[Transfer]) -> list[str]:
    """Names of the fields that Megatron-Core's config gets in one of these ways."""
    wanted = set(kinds)
    return [name for name, facts in _facts(section).items() if facts.get("mcore") in wanted]


def per_class[F: Callable[..., Any]](function: F) -> F:
    """`functools.cache`, typed for functions of a section's class: mypy takes that class for unhashable."""
    return cast(F, cache(function))


@per_class
def _facts(section: type) -> dict[str, Any]:
    return {field.name: field.metadata for field in fields(section)}
