"""What each pipeline stage will hold in memory, before anything is built. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import le

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.parallel.grid import RankGrid
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.activations import Activations
from megatron_mtp.parallel.planner.cost import DTYPE_BYTES, layer_kinds
from megatron_mtp.parallel.planner.schedule import ScheduleKind, compute_order
from megatron_mtp.parallel.rank_params import RankParameters, chunk_parameters, mtp_rank_parameters

MOMENT_BYTES = {"adam": 8, "sgd": 4, "muon": 4}
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on one rank at the worst moment of a step.

    Attributes:
        weights: parameters as the forward pass reads them.
        gradients: the buffers they are reduced in.
        optimizer: fp32 copies and moments that this rank owns.
        activations: what autograd keeps of all micro-batches under way, at its peak.
        workspace: what a backward call needs for a while beyond that.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """Bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace


def num_microbatches(cfg: ConfigContainer, world_size: int) -> int:
    """Micro-batches of one rank in one step at the final global batch size."""
    replicas = RankGrid.from_config(cfg, world_size).dp_size
    return max(1, cfg.train.global_batch_size // (cfg.train.micro_batch_size * replicas))


def predict_memory(
    cfg: ConfigContainer,
    layout: PipelineLayout,
    stage: int,
    world_size: int,
    num_microbatches: int | None = None,
    *,
    is_cpu: bool | None = None,
) -> RankMemory:
    """Memory of every rank of a pipeline stage.

    Args:
        cfg: finalized, with a known vocabulary size.
        layout: of this model.
        stage: pipeline rank.
        world_size: of the job.
        num_microbatches: of one step; None: from the global batch size.
        is_cpu: count as torch's CPU kernels do; None: as dist.device says, a GPU unless it is "cpu".
    """
    return MemoryModel(cfg, world_size, num_microbatches, is_cpu).rank(layout, stage)


@dataclass(frozen=True, slots=True, eq=False)
class ChunkMemory:
    """One chunk's part in the memory of its rank.

    Args:
        held: parameters.
        trained: those of them that have gradients.
        kept: bytes that a micro-batch under way keeps.
        transient: bytes that a call needs for a while.
    """

    held: RankParameters
    trained: RankParameters
    kept: float
    transient: float


class MemoryModel:
    """`predict_memory` for many layouts of one config. Chunks that hold the same are weighed once."""

    def __init__(self, cfg: ConfigContainer, world_size: int, count: int | None = None, is_cpu: bool | None = None):
        self.cfg, self.grid = cfg, RankGrid.from_config(cfg, world_size)
        self.count = num_microbatches(cfg, world_size) if count is None else count
        on_cpu = cfg.dist.device == "cpu" if is_cpu is None else is_cpu
        self.parts = Activations(cfg, on_cpu, uses_te=not on_cpu and cfg.model.backend != "torch")
        self.kinds = tuple(layer_kinds(cfg.model))
        self._chunks: dict[tuple, ChunkMemory] = {}

    def rank(self, layout: PipelineLayout, stage: int) -> RankMemory:
        """Memory of every rank of a stage."""
        chunks = [
            self.chunk("".join(layout.chunks[stage][v]), layout.decoder_layers(stage, v)) for v in range(layout.vp)
        ]
        return self.stage(layout.pp, stage, chunks)

    def stage(self, pp: int, stage: int, chunks: Sequence[ChunkMemory]) -> RankMemory:
        """Memory of every rank of a stage that holds these chunks, in the order of its virtual stages."""
        cfg, item = self.cfg, DTYPE_BYTES[self.cfg.precision.dtype]
        held = sum((chunk.held for chunk in chunks), RankParameters(dense=0))
        trained = sum((chunk.trained for chunk in chunks), RankParameters(dense=0))
        owned: float = trained.total
        if cfg.ddp.use_distributed_optimizer:
            replicas = self.grid.dp_size * cfg.model.context_parallel_size
            owned = trained.dense / replicas + trained.expert / self.grid.expert_dp_size
        state = MOMENT_BYTES[cfg.optimizer.optimizer] + (0 if item == 4 else 4)
        return RankMemory(
            weights=held.total * item,
            gradients=trained.total * (4 if cfg.precision.grad_reduce_in_fp32 else item),
            optimizer=round(owned * state),
            activations=round(self.peak(pp, len(chunks), stage, [chunk.kept for chunk in chunks])),
            workspace=round(max(chunk.transient for chunk in chunks)),
        )

    def chunk(self, symbols: str, layers: range) -> ChunkMemory:
        """One chunk.

        Args:
            symbols: such as "Ettt".
            layers: indices of its decoder layers.
        """
        kinds = self.kinds[layers.start : layers.stop]
        key = (symbols, kinds, layers.stop == len(self.kinds))
        if key not in self._chunks:
            held = chunk_parameters(self.cfg.model, symbols, layers)
            names = list(kinds)
            self._chunks[key] = ChunkMemory(
                held,
                self._trained(held, symbols),
                self.parts.chunk(symbols, names),
                self.parts.transient(symbols, names),
            )
        return self._chunks[key]

    def _trained(self, held: RankParameters, symbols: str) -> RankParameters:
        model = self.cfg.model
        if not model.mtp_freeze_trunk:
            return held
        copies = min(1, symbols.count("m")) if model.mtp_use_repeated_layer else symbols.count("m")
        return mtp_rank_parameters(model) * copies if copies else RankParameters(dense=0)

    def peak(self, pp: int, vp: int, stage: int, kept: list[float]) -> float:
        """Most bytes of activations at once, when a micro-batch under way holds kept[v] in chunk v."""
        moments = _in_flight(pp, vp, stage, min(self.count, 3 * pp + self.count % pp))  # later rounds repeat
        return max(sum(n * size for n, size in zip(counts, kept, strict=True)) for counts in moments)


@lru_cache(maxsize=4096)
def _in_flight(pp: int, vp: int, stage: int, rounds: int) -> list[tuple[int, ...]]:
    """How many micro-batches are held in each chunk, at every moment of a step at which not all chunks hold fewer than at another."""
    counts, seen = [0] * vp, {(0,) * vp}
    for call in compute_order(ScheduleKind(pp=pp, vp=vp, num_microbatches=rounds), stage):
        counts[call.vp_rank] += 1 if call.is_forward else -1
        seen.add(tuple(counts))
    return [one for one in seen if not any(one != other and all(map(le, one, other)) for other in seen)]
