"""Errors a user can cause or must act on. The command line turns each into one message and its exit code."""

from __future__ import annotations


class MegatronMTPError(Exception):
    """Base of every error that is addressed to the user; its text is complete without a traceback."""

    exit_code = 2


class ConfigError(MegatronMTPError):
    """A configuration is wrong.

    Holds every problem found, so that a user mends them in one go. Each problem reads: field and value; the rule;
    the other value; what to do.

    Args:
        problems: one problem or several, each a complete sentence or more.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class PlanError(MegatronMTPError):
    """No layout fits, or a given layout breaks a rule of the pipeline."""


class CheckpointError(MegatronMTPError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class DataError(MegatronMTPError):
    """Input text, a tokenizer or an indexed dataset is missing, damaged, or does not fit the model."""


class ConversionError(MegatronMTPError):
    """A tensor or a config cannot be carried between formats."""


class UnsupportedError(ConfigError):
    """A combination is refused by name because it would be wrong or is not built."""


class NumericsError(MegatronMTPError):
    """Losses or gradients are bad, and the run's policy is to stop. Starting again without a change leads here again."""

    exit_code = 4


class OutOfMemoryError(MegatronMTPError):
    """The memory of a device did not suffice; the text says what was planned and what would help."""


class ReplicaError(MegatronMTPError):
    """Data-parallel replicas hold different weights. Starting again from a checkpoint makes them equal."""

    exit_code = 1
