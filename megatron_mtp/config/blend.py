"""Reads the data of a config: which data sets are mixed, and how each is split into train, validation and test."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_mtp.config.knob import INT64_MAX
from megatron_mtp.config.quantity import parse_quantity, read_number
from megatron_mtp.config.sections import DatasetConfig
from megatron_mtp.errors import ConfigError, Problem
from megatron_mtp.storage.address import is_address

SPLITS = ("train", "valid", "test")
MAIN_LABEL = "validation"
"""What records and `checkpoint.best_metric` call the main validation set, "valid"."""
BLEND_FORM = "must be [[prefix, ...], [weight, ...] or null], or a flat list: prefix, ... or weight, prefix, ..."


@dataclass(frozen=True, slots=True)
class Blend:
    """Data sets to mix.

    Attributes:
        prefixes: of the files.
        weights: one for each prefix; None: its number of samples, so that an epoch of the mixture is an epoch of each.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def is_mock(dataset: DatasetConfig) -> bool:
    """Whether the run uses synthetic data."""
    return dataset.mock or (dataset.blend is None and dataset.blend_per_split is None)


def valid_names(dataset: DatasetConfig) -> tuple[str, ...]:
    """Names of a run's validation sets: the main one, "valid", unless its share is 0, then those of valid_sets."""
    if dataset.blend_per_split is not None:
        has_main = dataset.blend_per_split[1] is not None
    else:
        has_main = dataset.split is None or parse_split(dataset.split)[1] > 0  # None: mock data
    return (*SPLITS[1 : 1 + has_main], *(dataset.valid_sets or {}))


def set_label(name: str) -> str:
    """What records call the validation set `name`."""
    return MAIN_LABEL if name == SPLITS[1] else name


def parse_blend(value: Any) -> Blend:
    """Reads a blend as Megatron writes it.

    Args:
        value: [[prefix, ...], [weight, ...] or None]; or a flat list of prefixes; or a flat list of weights and
            prefixes in turn ([0.7, "a", 0.3, "b"]).

    Raises:
        ValueError: it has none of these forms; the text is the rule that it breaks.
    """
    items = list(value) if isinstance(value, list | tuple) else []
    if items and isinstance(items[0], list | tuple):
        prefixes, weights, *rest = [*items, None] if len(items) == 1 else items
    elif len(items) % 2 == 0 and all(_weight(item) is not None for item in items[::2]):
        prefixes, weights, rest = items[1::2], items[::2] or None, []
    else:
        prefixes, weights, rest = items, None, []
    if rest or not prefixes or not all(isinstance(prefix, str) for prefix in prefixes):
        raise ValueError(BLEND_FORM)
    if len(set(prefixes)) < len(prefixes):
        raise ValueError("holds a prefix twice; give it once, with the sum of its weights")
    if weights is None:
        return Blend(tuple(prefixes), None)
    numbers = [_weight(weight) for weight in weights] if isinstance(weights, list | tuple) else [None]
    if len(numbers) != len(prefixes):
        raise ValueError(f"has {len(prefixes)} prefixes and {len(numbers)} weights; each prefix needs one weight")
    if not all(number is not None and 0 < number < math.inf for number in numbers):
        raise ValueError("has a weight that is no number; all must be finite and above 0")
    return Blend(tuple(prefixes), tuple(float(number) for number in numbers if number is not None))


def training_blend(dataset: DatasetConfig) -> Blend | None:
    """The blend of the training data; None: mock data.

    Raises:
        ValueError: as `parse_blend`.
    """
    value = dataset.blend if dataset.blend_per_split is None else dataset.blend_per_split[0]
    return None if value is None else parse_blend(value)


def has_addresses(dataset: DatasetConfig) -> bool:
    """Whether any prefix, of training or validation data, lies in object storage.

    Raises:
        ValueError: as `parse_blend`.
    """
    blends = [dataset.blend, *(dataset.blend_per_split or ()), *(dataset.valid_sets or {}).values()]
    return any(is_address(prefix) for blend in blends if blend is not None for prefix in parse_blend(blend).prefixes)


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a run draws from a source: a number of tokens, or of its epochs."""

    tokens: int | None = None
    epochs: float | None = None

    @classmethod
    def parse(cls, value: int | str) -> Budget:
        """Reads "20B" or 5000 as tokens, and "4 epochs" or "0.5 epochs" as epochs.

        Raises:
            ConfigError: it is neither, or not above 0.
        """
        rule = 'must be a number of tokens such as "20B" or of epochs such as "4 epochs", above 0'
        words = value.split() if isinstance(value, str) else []
        try:
            if len(words) == 2 and words[1] in ("epoch", "epochs"):
                budget = cls(epochs=read_number(words[0], float))
            else:
                budget = cls(tokens=parse_quantity(value))
        except (ValueError, ConfigError) as error:
            raise ConfigError(Problem(value=value, rule=rule)) from error
        if not 0 < (budget.tokens or budget.epochs or 0) < INT64_MAX:
            raise ConfigError(Problem(value=value, rule=rule))
        return budget

    def samples(self, num_samples: int, seq_length: int) -> int:
        """Samples of `seq_length` tokens within the budget, of a source with `num_samples`."""
        if self.tokens is not None:
            return self.tokens // seq_length
        return int((self.epochs or 0.0) * num_samples)


def _weight(item: Any) -> float | None:
    """The number of `item`, which may be text; None: it is none."""
    if isinstance(item, bool) or not isinstance(item, int | float | str):
        return None
    try:
        return read_number(item, float) if isinstance(item, str) else item
    except ValueError:
        return None


def parse_split(text: str) -> tuple[float, ...]:
    """Reads shares of train, validation and test such as "9999,8,2", in any unit.

    Raises:
        ValueError: it holds something else; the text is the rule that it breaks.
    """
    try:
        shares = [read_number(share, float) for share in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(SPLITS) or not all(0 <= share < math.inf for share in shares) or not sum(shares):
        raise ValueError("must be three shares such as 9999,8,2 (train, validation, test)")
    return tuple(shares)
