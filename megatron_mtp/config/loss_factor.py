"""The MTP loss factor as a function of the tokens seen.

lambda in: total = L_0 + lambda / D * sum_k w_k L_k. DeepSeek-V3, GLM-4.5 and MiMo all lower it from 0.3 to 0.1 when the
learning rate starts to fall (arXiv 2412.19437 section 4.2; each recipe names its values).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from megatron_mtp.config.quantity import parse_quantity, read_number
from megatron_mtp.errors import ConfigError, Problem

FORMS = 'a number such as 0.1, steps in tokens such as "0.3@0,0.1@10T", or "linear:0.3->0.1@10T"'


@dataclass(frozen=True, slots=True)
class LossFactor:
    """A factor that is constant, changes in steps, or moves along a line and then stays constant.

    Args:
        tokens: where each factor begins; starts at 0 and rises.
        factors: one factor for each entry of `tokens`, finite and not negative.
        is_linear: between two entries the factor moves along a line; otherwise it stays until the next one.
    """

    tokens: tuple[int, ...]
    factors: tuple[float, ...]
    is_linear: bool = False

    @classmethod
    def parse(cls, text: float | str) -> LossFactor:
        """Reads `model.mtp_loss_scaling_factor`.

        Raises:
            ConfigError: the text is none of the known forms, or a factor is negative, NaN or infinite.

        Example: LossFactor.parse("0.3@0,0.1@10T").at(10**13) == 0.1.
        """
        if isinstance(text, bool) or not isinstance(text, int | float | str):
            raise ConfigError(Problem(value=text, rule=f"must be {FORMS}"))
        if isinstance(text, str) and text.startswith("linear:"):
            start, arrow, rest = text.removeprefix("linear:").partition("->")
            end, at, tokens = rest.partition("@")
            if not arrow or not at:
                rule = "a line is written as linear:0.3->0.1@10T (from, to, tokens it takes)"
                raise ConfigError(Problem(value=text, rule=rule))
            return cls((0, _tokens(text, tokens)), (_factor(text, start), _factor(text, end)), is_linear=True)
        if isinstance(text, str) and "@" in text:
            return cls._from_steps(text)
        return cls((0,), (_factor(text, text),))

    @classmethod
    def _from_steps(cls, text: str) -> LossFactor:
        steps = [step.partition("@") for step in text.split(",")]
        factors = tuple(_factor(text, factor) for factor, _, _ in steps)
        tokens = tuple(_tokens(text, where) for _, _, where in steps)
        if tokens[0] != 0 or any(later <= earlier for earlier, later in pairwise(tokens)):
            rule = "the steps must start at 0 tokens and rise, as in 0.3@0,0.1@10T"
            raise ConfigError(Problem(value=text, rule=rule))
        return cls(tokens, factors)

    def at(self, consumed_tokens: int) -> float:
        """The factor for the step that begins after `consumed_tokens` tokens."""
        if self.is_linear:
            end = self.tokens[1]
            share = 1.0 if consumed_tokens >= end else consumed_tokens / end
            return self.factors[0] + share * (self.factors[1] - self.factors[0])
        return self.factors[max(0, bisect_right(self.tokens, consumed_tokens) - 1)]

    @property
    def extremes(self) -> tuple[float, float]:
        """Smallest and largest factor of the run."""
        return min(self.factors), max(self.factors)


def _factor(text: float | str, part: float | str) -> float:
    try:
        value = read_number(part, float) if isinstance(part, str) else float(part)
    except (ValueError, OverflowError):
        raise ConfigError(Problem(value=text, rule=f"must be {FORMS}")) from None
    if not math.isfinite(value) or value < 0:
        rule = "a loss factor must be a finite number that is not negative; 0.1 to 0.3 is usual"
        raise ConfigError(Problem(value=text, rule=rule))
    return value


def _tokens(text: str, part: str) -> int:
    try:
        return parse_quantity(part)
    except ConfigError as error:
        raise ConfigError(Problem(value=text, rule=f"tokens {error}")) from None
