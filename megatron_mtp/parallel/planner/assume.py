"""What a plan may assume of software that this trainer does not run: FP8, CUDA graphs, overlap of messages.

Published runs use it, and a plan that is held against them has to know it. These are options of the planner only
(`megatron-mtp plan --assume fp8=mxfp8`): no config has them, so no run can be started that silently lacks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from megatron_mtp.config.form import read_form
from megatron_mtp.config.knob import knob
from megatron_mtp.errors import PlanError, Problem, nearest

OPTION = "--assume"


class Fp8Recipe(NamedTuple):
    """Bytes that one FP8 recipe moves for each number that it converts, and those that it keeps.

    Args:
        quantize_bytes: read and written to convert one number of bfloat16, for the product and its transpose.
        kept_bytes: what is kept of one number for the backward pass, scales included.
        speed: of products, against those with one scale for each tensor.
    """

    quantize_bytes: float
    kept_bytes: float
    speed: float = 1.0


MXFP8_SPEED = 0.87
"""Fitted to published runs with the constants of config/machines.py."""
FP8_RECIPES = {
    # The largest value is found in a pass of its own (2), then read (2) and written in two orders (1 + 1).
    "tensorwise": Fp8Recipe(6.0, 1.0),
    # One scale for each 128 or 128 x 128 numbers.
    "blockwise": Fp8Recipe(4.25, 1 + 4 / 128),
    # One scale of a byte for each 32 numbers along both axes.
    "mxfp8": Fp8Recipe(4.25, 1 + 1 / 32, MXFP8_SPEED),
}
"""Transformer Engine's recipes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a plan assumes of software that this trainer does not run.

    Args:
        fp8: recipe of Transformer Engine for the products of linear layers and experts. Router, attention scores, head
            and everything between products stay in precision.dtype.
        fp8_parameters: weights are kept and gathered in FP8, with their fp32 copies in the optimizer as before.
        graphs: what is replayed as a CUDA graph, so that Python does not slow it down: attention and the router, or
            all.
        dispatch: alltoall sends a token once for each of its experts; deduplicated (DeepEP, HybridEP) once to each node
            that has some.
        overlap_experts: the exchanges of one micro-batch run while another one computes.
        overlap_tensor: messages of tensor parallelism run while products compute (Transformer Engine's user buffers).
        busiest_rank: tokens of the expert-parallel rank with the most, as a multiple of the mean.
    """

    fp8: Literal["none", "tensorwise", "blockwise", "mxfp8"] = "none"
    fp8_parameters: bool = False
    graphs: Literal["none", "attention", "all"] = "none"
    dispatch: Literal["alltoall", "deduplicated"] = "alltoall"
    overlap_experts: bool = False
    overlap_tensor: bool = False
    busiest_rank: float = knob(1.0, ge=1, le=1e6)

    @property
    def recipe(self) -> Fp8Recipe | None:
        """The FP8 recipe."""
        return FP8_RECIPES.get(self.fp8)

    def words(self) -> str:
        """What differs from the defaults, for a reader."""
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default and f.name != "busiest_rank"]
        texts = [f"{f.name}={str(getattr(self, f.name)).lower()}" for f in changed]
        return ", ".join(texts + ([f"busiest_rank={self.busiest_rank:g}"] if self.busiest_rank > 1 else []))


NOTHING = Assumptions()
"""The trainer as it is."""


def read_assumptions(texts: Sequence[str]) -> Assumptions:
    """Assumptions as a user writes them, each "name=value".

    Raises:
        PlanError: a name or a value is not known; all are named.
    """
    known, values, problems = {f.name for f in fields(Assumptions)}, {}, []
    for text in texts:
        name, sign, value = text.partition("=")
        name = name.strip()
        if not sign or name not in known:
            rule = f"must be name=value with one of {', '.join(sorted(known))}.{nearest(name, known)}"
            problems.append(Problem(fields=(OPTION,), value=text, rule=rule))
            continue
        values[name] = _parsed(value.strip())
    if problems:
        raise PlanError(problems)
    found, problems = read_form(Assumptions, values, OPTION)
    if found is None:
        raise PlanError(problems)
    return found


def _parsed(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text
