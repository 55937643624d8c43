"""Errors a user can cause or must act on. The command line turns each into one message and its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, Self

NOT_GIVEN: Final = object()
"""Stands for a value that a problem does not have; None is a value of config fields."""


SHOWN_LENGTH = 200
"""Characters of a value that a message shows."""


def cut(text: str, length: int = SHOWN_LENGTH) -> str:
    """`text`, or its beginning and how long it is."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def shown(value: Any) -> str:
    """A value as a message shows it: as Python writes it, and cut."""
    try:
        return cut(repr(value))
    except (ValueError, RecursionError):  # Python writes no integer of more than 4300 digits
        return f"{type(value).__name__} that is too long to show"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong, and what to do about it.

    Args:
        fields: config fields that the rule reads, as "section.field", or an option, or an entry of a file; the first is
            the one to change.
        value: of the first field.
        rule: what must hold, such as "must be at least 1".
        remedy: what to do, if the rule does not say it.
        where: file or option that the value came from.
        is_refusal: the combination is not supported, in contrast to a mistake.
    """

    rule: str
    fields: tuple[str, ...] = ()
    value: Any = NOT_GIVEN
    remedy: str = ""
    where: str = ""
    is_refusal: bool = False

    def __str__(self) -> str:
        parts = [*map(cut, self.fields[:1]), *([shown(self.value)] if self.value is not NOT_GIVEN else [])]
        text = " ".join(_sentence(part) for part in (self.rule, self.remedy) if part)
        return ": ".join(part for part in (cut(self.where), " = ".join(parts), text) if part)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        value = None if self.value is NOT_GIVEN else _plain(self.value)
        data = {"fields": list(self.fields), "value": value, "rule": self.rule, "remedy": self.remedy}
        return data | {"where": self.where, "is_refusal": self.is_refusal}


def _plain(value: Any) -> Any:
    """`value`, or its text if JSON cannot hold it."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return shown(value)
    return value


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def nearest(name: str, known: Iterable[str], count: int = 1, prefix: str = "", cutoff: float = 0.6) -> str:
    """ " Did you mean X?" with the known names closest to `name`, or nothing if none is close.

    Args:
        count: names to offer at most.
        prefix: stands before each name.
        cutoff: similarity from 0 to 1; above the default where all names are alike.
    """
    import difflib  # only needed for a mistake

    close = [prefix + match for match in difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)]
    return f" Did you mean {' or '.join(close)}?" if close else ""


class MegatronMTPError(Exception):
    """Base of every error that is addressed to the user; its text is complete without a traceback."""

    exit_code = 2
    is_shared = False
    """Whether every rank of a job meets it, so that rank 0 can report it for all."""

    @property
    def problems(self) -> list[Problem]:
        """What is wrong, one entry for each problem."""
        return [Problem(rule=line) for line in str(self).splitlines()]


class ProblemsError(MegatronMTPError):
    """Holds every problem that was found, so that a user can fix all of them at once.

    Args:
        problems: one problem or several; plain text is a Problem without fields.
    """

    is_shared = True

    def __init__(self, problems: str | Problem | Iterable[str | Problem]):
        given = [problems] if isinstance(problems, str | Problem) else list(problems)
        self._problems = [Problem(rule=problem) if isinstance(problem, str) else problem for problem in given]
        super().__init__("\n".join(map(str, self._problems)))

    @property
    def problems(self) -> list[Problem]:
        return self._problems

    def within(self, where: str) -> Self:
        """The same error; each problem says that it was found in `where`, such as a file or an option."""
        return type(self)([replace(p, where=f"{where}: {p.where}" if p.where else where) for p in self._problems])


class ConfigError(ProblemsError):
    """A configuration is wrong."""


class PlanError(ProblemsError):
    """No layout fits, or a given layout breaks a rule of the pipeline."""


class CheckpointError(MegatronMTPError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class InUseError(MegatronMTPError):
    """Another process uses the directory; names the process."""

    is_shared = True


class NotSavedError(MegatronMTPError):
    """A run came to its end, and its last checkpoint could not be saved. Started again, it repeats the lost steps."""

    exit_code = 6
    is_shared = True


class DataError(MegatronMTPError):
    """Input text, a tokenizer or an indexed dataset is missing, damaged, or does not fit the model."""


class LostDataError(DataError):
    """Data that a run could open at its start can no longer be read, or is damaged; names the file."""

    is_shared = True


class ConversionError(MegatronMTPError):
    """A tensor or a config cannot be carried between formats."""


class UnsupportedError(ConfigError):
    """A combination is refused by name because it would be wrong or is not built."""


class NumericsError(MegatronMTPError):
    """Losses or gradients are bad, and the run's policy is to stop. A restart without a change ends here again."""

    exit_code = 4
    is_shared = True


class StoppedEvaluationError(MegatronMTPError):
    """SIGTERM came during an evaluation, which has no result then. Nothing was to be saved: start it again."""

    exit_code = 143
    is_shared = True


class NodeError(ProblemsError):
    """A machine of the job is not fit for it: GPUs are missing or in use, or a disk is full. Another one may be."""

    exit_code = 7


class OutOfMemoryError(MegatronMTPError):
    """A device ran out of memory; the text says what was planned and what would help."""


class ForwardStepError(MegatronMTPError):
    """A forward_step of one's own returns what cannot be used."""


class ReplicaError(MegatronMTPError):
    """Data-parallel replicas hold different weights. Starting again from a checkpoint makes them equal."""

    exit_code = 1
