"""The time and memory of a layout, stage by stage, and the choice of the fastest layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from megatron_mtp.config.layout_text import SIZES
from megatron_mtp.config.units import DTYPE_BYTES, GIB
from megatron_mtp.errors import PlanError, Problem
from megatron_mtp.parallel.flops import train_flops_per_token
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.params import RankParameters, rank_parameters
from megatron_mtp.parallel.planner.assume import NOTHING, Assumptions
from megatron_mtp.parallel.planner.cost import layer_times
from megatron_mtp.parallel.planner.part_costs import ZERO, PartCosts, PartTime
from megatron_mtp.parallel.planner.schedule import ScheduleKind
from megatron_mtp.parallel.planner.search_split import FEW, SplitChoice, best_split
from megatron_mtp.parallel.planner.split import Split, SplitProblem
from megatron_mtp.parallel.planner.stage_memory import ChunkMemory, MemoryModel, RankMemory
from megatron_mtp.parallel.planner.steady import step_time
from megatron_mtp.parallel.shape import RunShape


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Where the time of one step goes, in milliseconds.

    Attributes:
        pipeline_ms: forward and backward passes of all micro-batches, from the first call to the last.
        update_ms: gradients, optimizer and weights, on the rank where they take longest.
        reduce_ms: messages over data-parallel ranks that no computation hides, on the same rank.
        other_ms: once per step, whatever is trained.
    """

    pipeline_ms: float
    update_ms: float
    reduce_ms: float
    other_ms: float

    @property
    def total_ms(self) -> float:
        """Total step time."""
        return self.pipeline_ms + self.update_ms + self.reduce_ms + self.other_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One pipeline rank.

    Attributes:
        holds: symbols of each of its chunks.
        chunks: time of one micro-batch in each of them.
        parameters: number of parameters on one rank of the stage.
        idle: share of the pipeline's time in which it computes nothing.
    """

    rank: int
    holds: tuple[str, ...]
    chunks: tuple[PartTime, ...]
    parameters: int
    memory: RankMemory
    idle: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A layout with its time and memory.

    Attributes:
        num_microbatches: micro-batches of one rank in one step.
        tokens_per_s: rate of the job.
        mfu: None if the device's peak is unknown.
    """

    layout: PipelineLayout
    stages: tuple[Stage, ...]
    step: StepTime
    num_microbatches: int
    tokens_per_s: float
    mfu: float | None

    @property
    def bubble(self) -> float:
        """Mean idle share of the stages."""
        return sum(stage.idle for stage in self.stages) / len(self.stages)

    @property
    def peak_bytes(self) -> int:
        """Memory of the fullest stage."""
        return max(stage.memory.total for stage in self.stages)


@dataclass(frozen=True, slots=True)
class Planner:
    """Estimates time and memory of layouts of one config, and chooses the fastest.

    Args:
        shape: of a config with a known vocabulary size.
        costs: times of its parts, estimated or measured.
        peak_tflops: dense peak of one device, for MFU; None: unknown.
        is_cpu: memory is counted as on a CPU, and stages do not free what they have sent.
        assume: what the costs assume, for memory and messages.
    """

    shape: RunShape
    costs: PartCosts
    peak_tflops: float | None = None
    is_cpu: bool = False
    assume: Assumptions = NOTHING

    def problem(self) -> SplitProblem:
        """What can be chosen, and what each part costs."""
        model, costs, link = self.shape.cfg.model, self.costs, self.costs.pipeline_link
        depths, size = self.shape.depths.count, self.shape.hidden_bytes
        return SplitProblem(
            kind=ScheduleKind(
                pp=model.pipeline_model_parallel_size,
                vp=model.virtual_pipeline_model_parallel_size,
                num_microbatches=self.shape.num_microbatches,
                sends_block=not self.is_cpu,
            ),
            layers=tuple(layer_times(costs, self.shape)),
            embedding=costs.embedding,
            final_norm=costs.final_norm,
            mtp=costs.mtp_layer * depths if depths else ZERO,
            loss=costs.head + costs.mtp_head * depths,
            overhead=costs.chunk,
            num_depths=depths,
            message_ms=link.ms(size),
            wide_message_ms=link.ms(size * (1 + depths)),
            shapes_ms=link.latency_ms,
            mtp_needs_layer=depths > 0 and model.mtp_hidden_source == "pre_final_norm",
        )

    def choose(
        self, limit_bytes: float | None = None, effort: int = 150, few: int = FEW, to_beat_ms: float = inf
    ) -> SplitChoice:
        """The fastest layout that fits.

        Args:
            limit_bytes: memory of one device; None: no limit.
            effort, few, to_beat_ms: see `best_split`.

        Raises:
            PlanError: there is no legal layout, or none fits, or none can be faster than `to_beat_ms`.
        """
        problem, num_layers = self.problem(), self.shape.cfg.model.num_layers
        if not problem.variants:
            rule = f"too few for {problem.num_chunks} chunks of which none may be empty"
            remedy = f"Lower {' or '.join(SIZES)}."
            raise PlanError(Problem(fields=("model.num_layers", *SIZES), value=num_layers, rule=rule, remedy=remedy))
        memory = MemoryModel(self.shape, self.is_cpu, self.assume)
        check = None if limit_bytes is None else _MemoryCheck(problem, memory, limit_bytes)
        fits, stage_fits = (check.split, check.stage) if check else (None, None)
        choice = best_split(problem, fits=fits, stage_fits=stage_fits, effort=effort, few=few, to_beat_ms=to_beat_ms)
        if choice is None:
            assert check is not None, "without a limit every split fits"
            rule = (
                f"no split over {problem.num_chunks} chunks fits the memory of {check.limit_bytes / GIB:.1f} GiB; "
                f"{check.nearest}"
            )
            remedy = "Use more pipeline stages or tensor ranks, a smaller train.micro_batch_size, or recomputation."
            raise PlanError(Problem(fields=("model.num_layers", *SIZES), value=num_layers, rule=rule, remedy=remedy))
        return choice

    def plan(self, layout: PipelineLayout) -> Plan:
        """Time and memory of one layout."""
        cfg, memory, step = self.shape.cfg, MemoryModel(self.shape, self.is_cpu, self.assume), self.step(layout)
        times, count = self.problem().work(Split.of(layout)).chunks, self.shape.num_microbatches
        stages = tuple(
            Stage(
                rank=p,
                holds=tuple("".join(chunk) for chunk in layout.chunks[p]),
                chunks=times[p],
                parameters=rank_parameters(cfg.model, layout, p).total,
                memory=memory.rank(layout, p),
                idle=1 - count * sum(time.total_ms for time in times[p]) / step.pipeline_ms,
            )
            for p in range(layout.pp)
        )
        tokens = cfg.train.global_batch_size * cfg.model.seq_length
        rate = tokens / step.total_ms * 1e3
        flops = train_flops_per_token(cfg.model) * rate / self.shape.world_size
        return Plan(
            layout=layout,
            stages=stages,
            step=step,
            num_microbatches=count,
            tokens_per_s=rate,
            mfu=flops / (self.peak_tflops * 1e12) if self.peak_tflops else None,
        )

    def step(self, layout: PipelineLayout) -> StepTime:
        """Time of one step."""
        problem = self.problem()
        work = problem.work(Split.of(layout))
        pipeline_ms = self.shape.num_microbatches * sum(time.total_ms for time in work.chunks[0])
        if layout.pp > 1:
            pipeline_ms = step_time(problem.kind, work)
        after = [
            self._after_pipeline(rank_parameters(self.shape.cfg.model, layout, p), sum(work.chunks[p], ZERO))
            for p in range(layout.pp)
        ]
        update_ms, reduce_ms = max(after, key=sum)
        return StepTime(pipeline_ms=pipeline_ms, update_ms=update_ms, reduce_ms=reduce_ms, other_ms=self.costs.step_ms)

    def _after_pipeline(self, held: RankParameters, passes: PartTime) -> tuple[float, float]:
        """Milliseconds of (update, messages over replicas) on one stage.

        Messages that overlap with computation are hidden by one micro-batch's passes.
        """
        ddp, precision = self.shape.cfg.ddp, self.shape.cfg.precision
        costs, grid = self.costs, self.shape.grid
        dense, expert = (held.dense, grid.dp_size * grid.cp), (held.expert, grid.expert_dp_size)
        sharded = ddp.use_distributed_optimizer
        owned = sum(n / (replicas if sharded else 1) for n, replicas in (dense, expert))
        update_ms = (held.total * costs.update_ns_per_parameter + owned * costs.optimizer_ns_per_parameter) * 1e-6

        def over_replicas_ms(item_bytes: int) -> float:
            links = (costs.data_link, costs.expert_data_link or costs.data_link)
            groups = zip((dense, expert), links, strict=True)
            return sum(link.ms(n * item_bytes * (r - 1) / r) for (n, r), link in groups if r > 1 and n)

        item = 1 if self.assume.fp8_parameters else DTYPE_BYTES[precision.dtype]
        reduced = 4 if precision.grad_reduce_in_fp32 else DTYPE_BYTES[precision.dtype]
        reduce_ms = max(0.0, over_replicas_ms(reduced) - passes.backward_ms * ddp.overlap_grad_reduce)
        # An all-reduce sends gradients twice; a sharded optimizer sends them once and gathers updated weights.
        gather_ms = over_replicas_ms(item if sharded else reduced)
        return update_ms, reduce_ms + max(0.0, gather_ms - passes.forward_ms * ddp.overlap_param_gather)


@dataclass(slots=True)
class _MemoryCheck:
    """Whether stages and splits fit a memory limit. Remembers each chunk and each stage.

    Attributes:
        lowest: memory of the fullest stage in the split that came closest.
    """

    problem: SplitProblem
    memory: MemoryModel
    limit_bytes: float
    lowest: float = inf
    _chunks: dict[tuple[int, int, int, bool], ChunkMemory] = field(default_factory=dict)
    _stages: dict[tuple[int, tuple[ChunkMemory, ...]], int] = field(default_factory=dict)

    @property
    def nearest(self) -> str:
        """How close the checked splits came, as a sentence."""
        if self.lowest < inf:
            return f"the best one that was checked needs {self.lowest / GIB:.1f} GiB on its fullest stage."
        return "some stage is too full in each of them."

    def split(self, split: Split) -> bool:
        """Whether all stages fit."""
        pp = self.problem.kind.pp
        chunks = [self._chunk(chunk, *span, split.is_standalone) for chunk, span in enumerate(split.spans)]
        peak = max(self._stage_bytes(rank, tuple(chunks[rank::pp])) for rank in range(pp))
        self.lowest = min(self.lowest, peak)
        return peak <= self.limit_bytes

    def stage(self, rank: int, start: int, stop: int, is_standalone: bool) -> bool:
        """Whether a stage fits that holds the layers start..stop-1, without interleaving."""
        return self._stage_bytes(rank, (self._chunk(rank, start, stop, is_standalone),)) <= self.limit_bytes

    def _chunk(self, chunk: int, start: int, stop: int, is_standalone: bool) -> ChunkMemory:
        key = (chunk, start, stop, is_standalone)
        if key not in self._chunks:
            symbols = self.problem.symbols(chunk, stop - start, is_standalone)
            self._chunks[key] = self.memory.chunk(symbols, range(start, stop))
        return self._chunks[key]

    def _stage_bytes(self, rank: int, chunks: tuple[ChunkMemory, ...]) -> int:
        key = (rank, chunks)
        if key not in self._stages:
            self._stages[key] = self.memory.stage(self.problem.kind.pp, rank, chunks).total
        return self._stages[key]
