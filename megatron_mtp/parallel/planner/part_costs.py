"""Time of each part of a model on one rank, estimated or measured, and the file of measured times."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.errors import PlanError

VERSION = 1
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

    forward_ms: float
    backward_ms: float

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

    latency_ms: float
    gb_per_s: float

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
    step_ms: float = 0.0
    """Once per step on every rank: batch, counts, gradient norm, logs."""
    update_ns_per_parameter: float = 0.0
    """Once per step for each parameter that a rank holds: zeroing and local reduction of gradients, casts."""
    optimizer_ns_per_parameter: float = 0.0
    """Once per step for each parameter whose optimizer state a rank owns."""
    pipeline_link: Link
    """Between neighbouring stages."""
    data_link: Link
    """A reduce-scatter or all-gather over data-parallel ranks; bytes are those of the complete buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Measured part times and what they were measured with.

    Args:
        model: fields of the model section except FREE_FIELDS.
        dtype: precision.dtype.
        device: name of the device; "cpu" counts memory as on a CPU.
        notes: for the reader: versions, number of steps.
    """

    costs: PartCosts
    model: dict[str, Any]
    dtype: str
    micro_batch_size: int
    device: str
    notes: dict[str, Any] = field(default_factory=dict)

    def check_fits(self, cfg: ConfigContainer) -> None:
        """Raises PlanError that names every field in which a finalized `cfg` differs from what was measured."""
        here = measured_fields(cfg.model)
        here |= {"dtype": cfg.precision.dtype, "micro_batch_size": cfg.train.micro_batch_size}
        there = self.model | {"dtype": self.dtype, "micro_batch_size": self.micro_batch_size}
        differ = [
            f"{name} = {here.get(name)!r} here, {there.get(name)!r} there"
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
        ]
        if differ:
            raise PlanError(
                f"the profile was measured with other settings: {'; '.join(differ)}. "
                "Measure again with `megatron-mtp profile` and these settings, or plan without --profile."
            )

    def write(self, path: str | Path) -> None:
        """Writes JSON."""
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """A profile from the file that `write` made.

        Raises:
            PlanError: the file cannot be read or is not a profile.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise _unusable(path, f"it cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise _unusable(path, f"it is not JSON: {error}") from None
        needed = {"version", "costs", "model", "dtype", "micro_batch_size", "device"}
        if missing := needed - data.keys() if isinstance(data, dict) else needed:
            raise _unusable(path, f"it is not a profile: {', '.join(sorted(missing))} missing")
        if data.pop("version") != VERSION:
            raise _unusable(path, "it was written by another version")
        try:
            costs = {name: _part(value) for name, value in data.pop("costs").items()}
            return cls(costs=PartCosts(**costs), **data)
        except (ValueError, TypeError, AttributeError) as error:
            raise _unusable(path, f"an entry is wrong: {error}") from None


def _unusable(path: str | Path, reason: str) -> PlanError:
    return PlanError(f"profile {str(path)!r} cannot be used: {reason}. Write one with `megatron-mtp profile`.")


def measured_fields(model: ModelConfig) -> dict[str, Any]:
    """The fields of a finalized model section that the time of a part depends on."""
    return {f.name: getattr(model, f.name) for f in fields(model) if f.name not in FREE_FIELDS}


def _part(value: Any) -> Any:
    if not isinstance(value, dict):
        return float(value)
    if "forward_ms" in value:
        return PartTime(**value)
    if "latency_ms" in value:
        return Link(**value)
    return {kind: PartTime(**times) for kind, times in value.items()}
