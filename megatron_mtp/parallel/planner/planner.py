"""What a layout comes to: the time of a step, stage by stage, and its memory; and the layout that comes to least."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.errors import PlanError
from megatron_mtp.parallel.flops import train_flops_per_token
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.cost import DTYPE_BYTES, chunk_times, layer_times
from megatron_mtp.parallel.planner.part_costs import ZERO, PartCosts, PartTime
from megatron_mtp.parallel.planner.schedule import ScheduleKind
from megatron_mtp.parallel.planner.search_split import FEW, SplitChoice, best_split
from megatron_mtp.parallel.planner.simulate import Work
from megatron_mtp.parallel.planner.split import Split, SplitProblem
from megatron_mtp.parallel.planner.stage_memory import ChunkMemory, MemoryModel, RankMemory, num_microbatches
from megatron_mtp.parallel.planner.steady import step_time
from megatron_mtp.parallel.rank_params import rank_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Where the time of one step goes, in milliseconds.

    Attributes:
        pipeline_ms: forward and backward passes of all micro-batches, from the first call to the last.
        update_ms: gradients, optimizer, weights of the rank that has most of it.
        reduce_ms: messages over data-parallel ranks that no computing hides, of the rank that has most of them.
        other_ms: once per step whatever is trained.
    """

    pipeline_ms: float
    update_ms: float
    reduce_ms: float
    other_ms: float

    @property
    def total_ms(self) -> float:
        """Of the step."""
        return self.pipeline_ms + self.update_ms + self.reduce_ms + self.other_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One pipeline rank.

    Attributes:
        holds: symbols of each of its chunks.
        chunks: time of one micro-batch in each of them.
        parameters: of one rank of the stage.
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
    """A layout and all that is known of it.

    Attributes:
        num_microbatches: of one rank in one step.
        tokens_per_s: of the whole job.
        mfu: None where the device's peak is not known.
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
    """Times, weighs and chooses layouts of one config.

    Args:
        cfg: finalized, with a known vocabulary size.
        costs: of its parts, estimated or measured.
        world_size: of the job.
        frees_outputs: stages wait for their sends and free what was sent (GPUs).
        peak_tflops: of one device, for MFU.
        is_cpu: count memory as on a CPU.
    """

    cfg: ConfigContainer
    costs: PartCosts
    world_size: int
    frees_outputs: bool = True
    peak_tflops: float | None = None
    is_cpu: bool = False

    @property
    def count(self) -> int:
        """Micro-batches of one rank in one step."""
        return num_microbatches(self.cfg, self.world_size)

    def problem(self) -> SplitProblem:
        """What there is to choose."""
        return split_problem(
            self.cfg.model, self.costs, self.count, hidden_bytes(self.cfg), frees_outputs=self.frees_outputs
        )

    def work(self, layout: PipelineLayout) -> Work:
        """What the simulation of a layout needs."""
        return _work(self.cfg, layout, self.costs, chunk_times(self.costs, self.cfg.model, layout))

    def memory_model(self) -> MemoryModel:
        """Of this config."""
        return MemoryModel(self.cfg, self.world_size, self.count, self.is_cpu)

    def choose(
        self,
        limit_bytes: float | None = None,
        effort: int = 150,
        few: int = FEW,
        slowest_ms: float = float("inf"),
    ) -> SplitChoice:
        """The fastest layout that fits.

        Args:
            limit_bytes: of one device; None: no limit.
            effort, few, slowest_ms: see `best_split`.

        Raises:
            PlanError: there is no legal layout, or none fits, or none can be faster than `slowest_ms`.
        """
        problem, memory = self.problem(), self.memory_model()
        if not problem.variants():
            raise PlanError(
                f"model.num_layers = {self.cfg.model.num_layers}: too few for {problem.num_chunks} chunks of which none may be empty. "
                "Lower model.pipeline_model_parallel_size or model.virtual_pipeline_model_parallel_size."
            )
        fitting = Fitting(problem, memory, limit_bytes)
        has_limit = limit_bytes is not None
        choice = best_split(
            problem,
            fits=fitting.split if has_limit else None,
            stage_fits=fitting.stage if has_limit else None,
            effort=effort,
            few=few,
            slowest_ms=slowest_ms,
        )
        if choice is None:
            raise PlanError(
                f"no split of model.num_layers = {self.cfg.model.num_layers} over {problem.num_chunks} chunks fits the memory of "
                f"{(limit_bytes or 0) / 2**30:.1f} GiB; {fitting.nearest} "
                "Use more pipeline stages or tensor ranks, a smaller train.micro_batch_size, or recomputation."
            )
        return choice

    def plan(self, layout: PipelineLayout) -> Plan:
        """Everything about one layout."""
        memory = self.memory_model()
        times = chunk_times(self.costs, self.cfg.model, layout)
        step = predict_step(self.cfg, layout, self.costs, self.world_size, frees_outputs=self.frees_outputs)
        busy = [self.count * sum(t.forward_ms + t.backward_ms for t in rank) for rank in times]
        stages = tuple(
            Stage(
                rank=p,
                holds=tuple("".join(chunk) for chunk in layout.chunks[p]),
                chunks=tuple(times[p]),
                parameters=rank_parameters(self.cfg.model, layout, p).total,
                memory=memory.rank(layout, p),
                idle=1 - busy[p] / step.pipeline_ms,
            )
            for p in range(layout.pp)
        )
        tokens = self.cfg.train.global_batch_size * self.cfg.model.seq_length
        rate = tokens / step.total_ms * 1e3
        flops = train_flops_per_token(self.cfg.model) * rate / self.world_size
        return Plan(
            layout=layout,
            stages=stages,
            step=step,
            num_microbatches=self.count,
            tokens_per_s=rate,
            mfu=flops / (self.peak_tflops * 1e12) if self.peak_tflops else None,
        )


class Fitting:
    """Whether stages and splits fit a memory limit; what holds the same kinds of layers at the same place is weighed once."""

    def __init__(self, problem: SplitProblem, memory: MemoryModel, limit_bytes: float | None):
        self.problem, self.memory = problem, memory
        self.limit = float("inf") if limit_bytes is None else limit_bytes
        self.chunks: dict[tuple[int, int, int, bool], ChunkMemory] = {}
        self.sizes: dict[tuple[int, tuple[ChunkMemory, ...]], int] = {}
        self.least = float("inf")

    @property
    def nearest(self) -> str:
        """How near the splits that were weighed came."""
        if self.least < float("inf"):
            return f"the best one that was weighed needs {self.least / 2**30:.1f} GiB on its fullest stage."
        return "some stage is too full in each of them."

    def split(self, split: Split) -> bool:
        """Whether all stages fit."""
        pp, start, chunks = self.problem.kind.pp, 0, []
        for chunk, count in enumerate(split.counts):
            chunks.append(self._chunk(chunk, start, start + count, split.is_standalone))
            start += count
        peak = max(self._size(rank, tuple(chunks[rank::pp])) for rank in range(pp))
        self.least = min(self.least, peak)
        return peak <= self.limit

    def stage(self, rank: int, start: int, stop: int, is_standalone: bool) -> bool:
        """Whether a stage fits that holds the layers start..stop-1, without interleaving."""
        return self._size(rank, (self._chunk(rank, start, stop, is_standalone),)) <= self.limit

    def _chunk(self, chunk: int, start: int, stop: int, is_standalone: bool) -> ChunkMemory:
        key = (chunk, start, stop, is_standalone)
        if key not in self.chunks:
            symbols = self.problem.chunk_symbols(chunk, stop - start, is_standalone)
            self.chunks[key] = self.memory.chunk(symbols, range(start, stop))
        return self.chunks[key]

    def _size(self, rank: int, chunks: tuple[ChunkMemory, ...]) -> int:
        key = (rank, chunks)
        if key not in self.sizes:
            self.sizes[key] = self.memory.stage(self.problem.kind.pp, rank, chunks).total
        return self.sizes[key]


def predict_step(
    cfg: ConfigContainer,
    layout: PipelineLayout,
    costs: PartCosts,
    world_size: int,
    *,
    frees_outputs: bool = True,
    count: int | None = None,
) -> StepTime:
    """The time of one step.

    Args:
        cfg: finalized for this world size.
        frees_outputs: see Planner; False on a CPU.
        count: micro-batches of one rank; None: from the global batch size.
    """
    count = num_microbatches(cfg, world_size) if count is None else count
    times = chunk_times(costs, cfg.model, layout)
    if layout.pp == 1:
        pipeline_ms = count * sum(t.forward_ms + t.backward_ms for t in times[0])
    else:
        kind = ScheduleKind(pp=layout.pp, vp=layout.vp, num_microbatches=count, sends_block=frees_outputs)
        pipeline_ms = step_time(kind, _work(cfg, layout, costs, times))
    rest = [_after_pipeline(cfg, layout, costs, world_size, p, times[p]) for p in range(layout.pp)]
    update_ms, reduce_ms = max(rest, key=sum)
    return StepTime(pipeline_ms=pipeline_ms, update_ms=update_ms, reduce_ms=reduce_ms, other_ms=costs.step_ms)


def _work(cfg: ConfigContainer, layout: PipelineLayout, costs: PartCosts, times: list[list[PartTime]]) -> Work:
    size, link = hidden_bytes(cfg), costs.pipeline_link
    messages = [link.ms(size)] * (layout.pp * layout.vp - 1)
    if layout.has_standalone_mtp:
        messages[-1] = link.ms(size * (1 + (cfg.model.mtp_num_layers or 0)))
    return Work(
        chunks=tuple(map(tuple, times)),
        message_ms=tuple(messages),
        shapes_ms=link.latency_ms if layout.has_standalone_mtp else None,
    )


def _after_pipeline(
    cfg: ConfigContainer, layout: PipelineLayout, costs: PartCosts, world_size: int, stage: int, times: list[PartTime]
) -> tuple[float, float]:
    """(update, messages over replicas) of one stage, in milliseconds. What overlaps hides behind one micro-batch's passes."""
    held = rank_parameters(cfg.model, layout, stage)
    block = cfg.model.tensor_model_parallel_size * cfg.model.pipeline_model_parallel_size
    replicas = world_size // block  # dp x cp
    expert_block = (cfg.model.expert_tensor_parallel_size or 1) * cfg.model.expert_model_parallel_size
    expert_replicas = world_size // (expert_block * cfg.model.pipeline_model_parallel_size)
    sharded = cfg.ddp.use_distributed_optimizer
    owned = held.dense / (replicas if sharded else 1) + held.expert / (expert_replicas if sharded else 1)
    update_ms = (held.total * costs.update_ns_per_parameter + owned * costs.optimizer_ns_per_parameter) * 1e-6
    item = DTYPE_BYTES[cfg.precision.dtype]
    reduced = 4 if cfg.precision.grad_reduce_in_fp32 else item

    def over_replicas(item_bytes: int) -> float:
        pairs = ((held.dense, replicas), (held.expert, expert_replicas))
        return sum(costs.data_link.ms(n * item_bytes * (r - 1) / r) for n, r in pairs if r > 1 and n)

    forward, backward = sum(t.forward_ms for t in times), sum(t.backward_ms for t in times)
    reduce_ms = max(0.0, over_replicas(reduced) - backward * cfg.ddp.overlap_grad_reduce)
    # Without a sharded optimizer an all-reduce sends gradients twice, with it updated weights are gathered.
    gather_ms = over_replicas(item if sharded else reduced)
    return update_ms, reduce_ms + max(0.0, gather_ms - forward * cfg.ddp.overlap_param_gather)


def hidden_bytes(cfg: ConfigContainer) -> float:
    """One hidden state as it goes from stage to stage."""
    model = cfg.model
    shards = model.tensor_model_parallel_size if model.sequence_parallel else 1
    tokens = cfg.train.micro_batch_size * model.seq_length / model.context_parallel_size
    return tokens * model.hidden_size * DTYPE_BYTES[cfg.precision.dtype] / shards


def split_problem(
    model: ModelConfig, costs: PartCosts, count: int, state_bytes: float, *, frees_outputs: bool = True
) -> SplitProblem:
    """The split to be found for a model with these part times."""
    depths, link = model.mtp_num_layers or 0, costs.pipeline_link
    pp, vp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    return SplitProblem(
        kind=ScheduleKind(pp=pp, vp=vp, num_microbatches=count, sends_block=frees_outputs),
        layers=tuple(layer_times(costs, model)),
        embedding=costs.embedding,
        final_norm=costs.final_norm,
        mtp=costs.mtp_layer * depths if depths else ZERO,
        loss=costs.head + costs.mtp_head * depths,
        overhead=costs.chunk,
        num_depths=depths,
        message_ms=link.ms(state_bytes),
        wide_message_ms=link.ms(state_bytes * (1 + depths)),
        shapes_ms=link.latency_ms,
        mtp_needs_layer=depths > 0 and model.mtp_hidden_source == "pre_final_norm",
    )


def layout_of(problem: SplitProblem, split: Split) -> PipelineLayout:
    """A split as a layout."""
    return PipelineLayout.of_chunks(problem.symbols(split), problem.kind.pp, problem.kind.vp)
