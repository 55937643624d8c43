"""Memory of each pipeline stage, predicted before anything is built. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import le
from typing import NamedTuple

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.units import DTYPE_BYTES
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.params import RankParameters, Shards, chunk_parameters, mtp_layer_parameters
from megatron_mtp.parallel.planner.activations import Activations
from megatron_mtp.parallel.planner.assume import NOTHING, Assumptions
from megatron_mtp.parallel.planner.schedule import ScheduleKind, compute_order
from megatron_mtp.parallel.shape import RunShape

MOMENT_BYTES = {"adam": 8, "sgd": 4, "muon": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on one rank at the worst moment of a step.

    Attributes:
        weights: parameters as the forward pass reads them.
        gradients: the buffers that they are reduced in.
        optimizer: fp32 copies and moments that this rank owns.
        activations: what autograd keeps of all micro-batches in flight, at its peak.
        workspace: what a backward call needs temporarily in addition.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """Bytes in total."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


class ParameterBytes(NamedTuple):
    """Bytes for each parameter: its weight and its gradient, and for each that a rank owns, its optimizer state."""

    weight: float
    gradient: int
    optimizer: int


def parameter_bytes(cfg: ConfigContainer, assume: Assumptions = NOTHING) -> ParameterBytes:
    """Bytes for each parameter; below fp32 the optimizer keeps an fp32 copy of the weight.

    In FP8 a weight is there in two orders, for the product and for its gradient, in place of its half-precision form
    (`fp8_parameters`) or beside it. Embedding and head, which are not in FP8, are counted like the rest.
    """
    item = DTYPE_BYTES[cfg.precision.dtype]
    converted = 2 * assume.recipe.kept_bytes if assume.recipe else 0.0
    return ParameterBytes(
        weight=converted if assume.fp8_parameters and converted else item + converted,
        gradient=4 if cfg.precision.grad_reduce_in_fp32 else item,
        optimizer=MOMENT_BYTES[cfg.optimizer.optimizer] + (0 if item == 4 else 4),
    )


def predict_memory(shape: RunShape, layout: PipelineLayout, stage: int, *, is_cpu: bool | None = None) -> RankMemory:
    """Memory of every rank of a pipeline stage.

    Args:
        shape: of a config with a known vocabulary size.
        layout: of this model.
        stage: pipeline rank.
        is_cpu: count what torch's CPU kernels keep; None: if dist.device is "cpu".
    """
    return MemoryModel(shape, is_cpu).rank(layout, stage)


@dataclass(frozen=True, slots=True, eq=False)
class ChunkMemory:
    """One chunk's part in the memory of its rank.

    Args:
        held: parameters.
        trained: parameters with gradients.
        kept: bytes that each micro-batch in flight keeps.
        transient: bytes that a call needs temporarily.
    """

    held: RankParameters
    trained: RankParameters
    kept: float
    transient: float


class MemoryModel:
    """`predict_memory` for many layouts of one config. Chunks that hold the same are computed once."""

    def __init__(self, shape: RunShape, is_cpu: bool | None = None, assume: Assumptions = NOTHING):
        self.shape, cfg = shape, shape.cfg
        self.parts = Activations(shape, cfg.dist.device == "cpu" if is_cpu is None else is_cpu, assume)
        self.bytes, self.kinds = parameter_bytes(cfg, assume), tuple(shape.layer_kinds)
        self._chunks: dict[tuple[str, tuple[str, ...], bool], ChunkMemory] = {}

    def rank(self, layout: PipelineLayout, stage: int) -> RankMemory:
        """Memory of every rank of a stage."""
        chunks = enumerate(layout.chunks[stage])
        held = [self.chunk("".join(chunk), layout.decoder_layers(stage, v)) for v, chunk in chunks]
        return self.stage(layout.pp, stage, held)

    def fullest_bytes(self, layout: PipelineLayout) -> int:
        """Memory of the fullest stage."""
        return max(self.rank(layout, stage).total for stage in range(layout.pp))

    def stage(self, pp: int, stage: int, chunks: Sequence[ChunkMemory]) -> RankMemory:
        """Memory of every rank of a stage that holds these chunks, in the order of its virtual stages."""
        held = sum((chunk.held for chunk in chunks), RankParameters(dense=0))
        trained = sum((chunk.trained for chunk in chunks), RankParameters(dense=0))
        owned: float = trained.total
        if self.shape.cfg.ddp.use_distributed_optimizer:
            grid = self.shape.grid
            owned = trained.dense / (grid.dp_size * grid.cp) + trained.expert / grid.expert_dp_size
        return RankMemory(
            weights=round(held.total * self.bytes.weight),
            gradients=trained.total * self.bytes.gradient,
            optimizer=round(owned * self.bytes.optimizer),
            activations=round(self.peak(pp, len(chunks), stage, [chunk.kept for chunk in chunks])),
            workspace=round(max(chunk.transient for chunk in chunks)),
        )

    def chunk(self, symbols: str, layers: range) -> ChunkMemory:
        """A chunk of `symbols`, such as "Ettt", whose decoder layers have the indices `layers`."""
        kinds = self.kinds[layers.start : layers.stop]
        key = (symbols, kinds, layers.stop == len(self.kinds))
        if key not in self._chunks:
            model = self.shape.cfg.model
            held = trained = chunk_parameters(model, symbols, layers)
            if model.mtp_freeze_trunk:
                trained = mtp_layer_parameters(model, Shards.of(model)) * self.shape.depths.layers_in(symbols)
            kept, transient = self.parts.chunk(symbols, kinds), self.parts.transient(symbols, kinds)
            self._chunks[key] = ChunkMemory(held, trained, kept, transient)
        return self._chunks[key]

    def peak(self, pp: int, vp: int, stage: int, kept: list[float]) -> float:
        """Most bytes of activations at once, if each micro-batch in flight keeps kept[v] bytes in chunk v."""
        count = self.shape.num_microbatches
        moments = _in_flight(pp, vp, stage, min(count, 3 * pp + count % pp))  # later rounds repeat
        return max(sum(n * size for n, size in zip(counts, kept, strict=True)) for counts in moments)


@lru_cache(maxsize=4096)
def _in_flight(pp: int, vp: int, stage: int, rounds: int) -> list[tuple[int, ...]]:
    """Micro-batches that each chunk holds, at the moments of a step that may be the worst.

    A moment is left out if at another one every chunk holds at least as many.
    """
    counts, seen = [0] * vp, {(0,) * vp}
    for call in compute_order(ScheduleKind(pp=pp, vp=vp, num_microbatches=rounds), stage):
        counts[call.vp_rank] += 1 if call.is_forward else -1
        seen.add(tuple(counts))
    return [one for one in seen if not any(one != other and all(map(le, one, other)) for other in seen)]
