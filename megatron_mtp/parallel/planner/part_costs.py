"""Time of each part of a model on one rank, estimated or measured, and the file of measured times."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron_mtp.config.form import read_form
from megatron_mtp.config.knob import knob
from megatron_mtp.config.peaks import Dtype
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.errors import PlanError, Problem, shown
from megatron_mtp.parallel.shape import RunShape

VERSION = 1
MAX_MS = 1e9
"""Longest time of a part: eleven days."""
LEAST_MS = 1e-6
"""A layer takes longer than that on any device."""
# Fields of the model section that do not change a part's time: the number of parts, their places, and the loss.
FREE_FIELDS = frozenset(
    "num_layers moe_layer_freq mtp_num_layers mtp_loss_scaling_factor mtp_depth_weights mtp_use_repeated_layer "
    "pipeline_model_parallel_size virtual_pipeline_model_parallel_size pipeline_model_parallel_layout "
    "init_method_std moe_router_bias_update_rate moe_aux_loss_coeff moe_router_topk_scaling_factor "
    "make_vocab_size_divisible_by".split()
)


@dataclass(frozen=True, slots=True)
class PartTime:
    """Time of one part for one micro-batch on one rank; the backward pass includes recomputation."""

    forward_ms: float = knob(MISSING, ge=0, le=MAX_MS)
    backward_ms: float = knob(MISSING, ge=0, le=MAX_MS)

    @property
    def total_ms(self) -> float:
        """Forward and backward pass."""
        return self.forward_ms + self.backward_ms

    def __add__(self, other: PartTime) -> PartTime:
        return PartTime(self.forward_ms + other.forward_ms, self.backward_ms + other.backward_ms)

    def __mul__(self, times: float) -> PartTime:
        return PartTime(self.forward_ms * times, self.backward_ms * times)


ZERO = PartTime(0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link between ranks: a message of n bytes takes latency_ms + n / gb_per_s / 1e6 milliseconds."""

    latency_ms: float = knob(MISSING, ge=0, le=MAX_MS)
    gb_per_s: float = knob(MISSING, ge=1e-6, le=1e9)

    def ms(self, num_bytes: float) -> float:
        """Time of one message."""
        return self.latency_ms + num_bytes / (self.gb_per_s * 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCosts:
    """Times of all parts of a model, sharded as in its config (TP, SP, CP, EP, ETP, micro-batch, recomputation)."""

    embedding: PartTime
    layer: dict[str, PartTime]
    """By kind, such as "dense" or "moe"; a kind that the model lacks may be missing."""
    final_norm: PartTime
    """In the chunk of the last decoder layer."""
    mtp_layer: PartTime
    """One depth without its pass through the head: lookup of its tokens, norms, projection, transformer layer, norm."""
    head: PartTime
    """Output head and loss of depth 0."""
    mtp_head: PartTime
    """Output head and loss of one further depth."""
    chunk: PartTime = ZERO
    """Once for each call of a chunk: Python, launches, the schedule's bookkeeping."""
    step_ms: float = knob(0.0, ge=0, le=MAX_MS)
    """Once per step on every rank: batch, counts, gradient norm, logs."""
    update_ns_per_parameter: float = knob(0.0, ge=0, le=MAX_MS)
    """Once per step for each parameter that a rank holds: zeroing and local reduction of gradients, casts."""
    optimizer_ns_per_parameter: float = knob(0.0, ge=0, le=MAX_MS)
    """Once per step for each parameter whose optimizer state a rank owns."""
    pipeline_link: Link
    """Between neighbouring stages."""
    data_link: Link
    """A reduce-scatter or all-gather over data-parallel ranks; bytes are those of the complete buffer."""
    expert_data_link: Link | None = None
    """The same over the replicas of experts, which are further apart; None: as `data_link`."""

    def time_of(self, kind: str) -> PartTime:
        """Time of a decoder layer. Where linear attention was not measured, it is that of full attention; else zero."""
        return self.layer.get(kind) or self.layer.get(kind.removeprefix("linear ")) or ZERO


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Measured part times and what they were measured with.

    Args:
        model: fields of the model section except FREE_FIELDS.
        dtype: precision.dtype.
        device: name of the device; "cpu" counts memory as on a CPU.
        notes: for the reader: versions, number of steps.
    """

    version: int
    costs: PartCosts
    model: dict[str, Any]
    dtype: Dtype
    micro_batch_size: int = knob(MISSING, ge=1)
    device: str
    notes: dict[str, Any] = field(default_factory=dict)

    def check_fits(self, shape: RunShape) -> None:
        """Raises PlanError that names every setting in which a run differs from what was measured."""
        cfg = shape.cfg
        here = measured_fields(cfg.model)
        here |= {"dtype": cfg.precision.dtype, "micro_batch_size": cfg.train.micro_batch_size}
        there = self.model | {"dtype": self.dtype, "micro_batch_size": self.micro_batch_size}
        differ = [
            f"{name} = {shown(here.get(name))} here, {shown(there.get(name))} there"
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
        ]
        remedy = "Measure again with `megatron-mtp profile` and these settings, or plan without --profile."
        if differ:
            raise _unusable(f"it was measured with other settings: {'; '.join(differ)}", remedy).within("--profile")
        untimed = sorted({kind for kind in shape.layer_kinds if self.costs.time_of(kind).forward_ms < LEAST_MS})
        if untimed:
            rule = f"it holds no time above {LEAST_MS} ms of layers of kind {' and '.join(untimed)}"
            raise _unusable(rule, remedy).within("--profile")

    def write(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """A profile from the file that `write` made.

        Raises:
            PlanError: the file cannot be read, or keys, types or ranges are not those of a profile; all are named.
        """
        where, remedy = f"--profile {str(path)!r}", "Write one with `megatron-mtp profile`."
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            profile, problems = read_form(cls, data)
        except OSError as error:
            raise _unusable(f"it cannot be read: {error.strerror}", remedy).within(where) from None
        except ValueError as error:
            raise _unusable(f"it is not JSON: {error}", remedy).within(where) from None
        except RecursionError:
            raise _unusable("it is nested too deeply", remedy).within(where) from None
        if isinstance(data, dict) and data.get("version", VERSION) != VERSION:
            raise _unusable("it was written by another version", remedy).within(where)
        if profile is None:
            raise PlanError([replace(problem, remedy=remedy) for problem in problems]).within(where)
        return profile


def _unusable(rule: str, remedy: str) -> PlanError:
    return PlanError(Problem(rule=rule, remedy=remedy))


def measured_fields(model: ModelConfig) -> dict[str, Any]:
    """The fields of a finalized model section that the time of a part depends on."""
    return {f.name: getattr(model, f.name) for f in fields(model) if f.name not in FREE_FIELDS}
