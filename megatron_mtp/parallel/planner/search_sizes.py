"""Ranks parallel sizes, micro-batch sizes and recomputation for a number of devices, each with its best fitting split.

Each combination that divides evenly has a lower bound on its step time, and an estimate that adds the time to fill and
drain the pipeline. Combinations are planned in the order of the estimate until the effort is spent. Those whose lower
bound is above the best ones so far are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import ceil, inf, isqrt
from typing import Any, NamedTuple

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.machines import Machine
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.config.units import GIB
from megatron_mtp.errors import ConfigError, PlanError, Problem
from megatron_mtp.parallel.params import (
    RankParameters,
    Shards,
    layer_parameters,
    moe_pattern,
    mtp_dense_width,
    mtp_layer_parameters,
)
from megatron_mtp.parallel.planner.activations import Activations
from megatron_mtp.parallel.planner.assume import NOTHING, Assumptions
from megatron_mtp.parallel.planner.auto_layout import make_planner
from megatron_mtp.parallel.planner.cost import estimate_costs, layer_times
from megatron_mtp.parallel.planner.part_costs import PartCosts
from megatron_mtp.parallel.planner.planner import Plan
from megatron_mtp.parallel.planner.stage_memory import parameter_bytes
from megatron_mtp.parallel.shape import RunShape

MOST_PLANNED = 40
"""Combinations that are planned; DeepSeek-V3 on 1024 devices has thousands that divide evenly."""
NEAR = 1.05
"""The search ends when estimates exceed the last row of the table by this factor; they rarely exceed simulations."""
SPLITS_EACH, FEW_EACH = 12, 3000
"""Effort for each of them, see `best_split`."""
REFINED, SPLITS_REFINED = 4, 40
"""The top REFINED are planned again with this effort; the caller plans the best one with full effort."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One combination with its best split.

    Attributes:
        cfg: finalized, with layout "auto".
        dp: data-parallel replicas.
        recompute: none, selective or full.
    """

    cfg: ConfigContainer
    plan: Plan
    dp: int
    recompute: str

    @property
    def shape(self) -> RunShape:
        """Sizes of its run."""
        model = self.cfg.model
        block = model.tensor_model_parallel_size * model.context_parallel_size * model.pipeline_model_parallel_size
        return RunShape.of(self.cfg, self.dp * block)


class _Sizes(NamedTuple):
    tp: int
    cp: int
    ep: int
    pp: int
    vp: int
    dp: int
    micro: int
    micro_batches: int
    recompute: str


def search_sizes(
    cfg: ConfigContainer,
    machine: Machine,
    world_size: int,
    limit_bytes: float | None,
    top: int = 10,
    report: Callable[[str], None] = lambda _: None,
    assume: Assumptions = NOTHING,
) -> list[Candidate]:
    """The fastest combinations that fit, best first; each set of sizes once, with its fastest recomputation that fits.

    Args:
        cfg: not finalized; model, sequence length and global batch size are kept, parallel sizes are not.
        limit_bytes: memory of one device; None: no limit.
        report: called with a line about the progress before each combination that is planned.
        assume: see `Assumptions`.

    Raises:
        PlanError: nothing fits.
    """
    base = cfg.copy()
    _set_sizes(base, _Sizes(tp=1, cp=1, ep=1, pp=1, vp=1, dp=1, micro=1, micro_batches=1, recompute=""))
    base.finalize()
    search = _Search(base, machine, world_size, limit_bytes, assume)
    found = search.run(top, report)
    if not found:
        raise PlanError(search.nothing_fits())
    return found


class _Search:
    def __init__(
        self,
        base: ConfigContainer,
        machine: Machine,
        world_size: int,
        limit_bytes: float | None,
        assume: Assumptions = NOTHING,
    ):
        self.base, self.machine, self.world_size, self.limit = base, machine, world_size, limit_bytes
        self.assume = assume
        self.lowest = inf
        self.parts = cache(self._parts)

    def run(self, top: int, report: Callable[[str], None]) -> list[Candidate]:
        """The best combinations, fastest first."""
        ranked = sorted((self.estimate(sizes), idx, sizes) for idx, sizes in enumerate(self.combinations()))
        found: dict[tuple[int, ...], tuple[Candidate, _Sizes]] = {}
        planned = 0
        for estimate_ms, _, sizes in ranked:
            times = sorted(candidate.plan.step.total_ms for candidate, _ in found.values())
            key = (sizes.tp, sizes.cp, sizes.ep, sizes.pp, sizes.vp, sizes.micro)
            if len(times) >= top and estimate_ms >= NEAR * times[top - 1]:
                break
            if key in found or (len(times) >= top and self.bound(sizes) >= times[top - 1]) or not self.may_fit(sizes):
                continue
            planned += 1
            fastest = f", fastest so far {times[0] / 1e3:.3f} s" if times else ""
            report(f"planning combination {planned} of at most {MOST_PLANNED}: {_words(sizes)}{fastest}")
            to_beat_ms = times[top - 1] if len(times) >= top else inf
            if (candidate := self.candidate(sizes, SPLITS_EACH, to_beat_ms)) is not None:
                found[key] = candidate, sizes
            if planned >= MOST_PLANNED:
                break
        best = sorted(found.values(), key=_step_ms)
        for idx, (before, sizes) in enumerate(best[:REFINED]):
            report(f"planning number {idx + 1} of the best {min(REFINED, len(best))} again: {_words(sizes)}")
            candidate = self.candidate(sizes, SPLITS_REFINED)
            if candidate is not None and candidate.plan.step.total_ms < before.plan.step.total_ms:
                best[idx] = candidate, sizes
        return [candidate for candidate, _ in sorted(best, key=_step_ms)[:top]]

    def combinations(self) -> Iterator[_Sizes]:
        """All combinations that divide evenly."""
        model, world, batch = self.base.model, self.world_size, self.base.train.global_batch_size
        eps = [ep for ep in _powers(world) if (model.num_moe_experts or 1) % ep == 0]
        tps, cps, pps = self.dense_sizes()
        for tp, cp, pp in product(tps, cps, [pp for pp in pps if world % pp == 0]):
            if world % (tp * cp * pp):
                continue
            dp = world // (tp * cp * pp)
            for ep, micro in product(eps, (1, 2, 4, 8)):
                if (world // pp) % ep or batch % (micro * dp):
                    continue
                count = batch // (micro * dp)
                for vp in (1, 2, 3, 4) if pp > 1 and count % pp == 0 else (1,):
                    for recompute in ("none", "selective", "full") if pp * vp <= pps[-1] else ():
                        yield _Sizes(tp, cp, ep, pp, vp, dp, micro, count, recompute)

    def dense_sizes(self) -> tuple[list[int], list[int], range]:
        """TP, CP and PP that suit the model, whatever the number of devices; the last PP is the most chunks."""
        model = self.base.model
        tps = [tp for tp in _powers(self.machine.node_size) if model.num_attention_heads % tp == 0]
        cps = [cp for cp in _powers(8) if model.seq_length % (2 * cp) == 0 and model.seq_length // cp >= 4096] or [1]
        return tps, cps, range(1, model.num_layers + 3 + (1 if model.mtp_num_layers else 0))

    def trial(self, sizes: _Sizes) -> ConfigContainer:
        """The config of a combination, not finalized."""
        trial = self.base.copy()
        _set_sizes(trial, sizes)
        trial.model.update(**recompute_fields(trial.model, sizes.recompute))
        return trial

    def _parts(self, sizes: _Sizes) -> tuple[PartCosts, float, RankParameters, float]:
        """(part times, time of a micro-batch, parameters, kept activations) of all stages together."""
        trial = self.trial(sizes)
        shape = RunShape.of(trial, self.world_size)
        model, depths = trial.model, shape.depths.count
        costs = estimate_costs(shape, self.machine, self.assume)
        times = [*layer_times(costs, shape), costs.embedding, costs.head]
        times += [costs.mtp_layer] * depths + [costs.mtp_head] * depths
        kinds, shards = shape.layer_kinds, Shards.of(model)
        held = mtp_layer_parameters(model, shards) * shape.depths.distinct
        for kind in kinds:
            held += layer_parameters(model, shards, "moe" in kind, is_linear="linear" in kind)
        activations = Activations(shape, self.machine.is_cpu, self.assume)
        kept = sum(activations.layer(kind) for kind in kinds)
        return costs, sum(time.total_ms for time in times), held, kept

    def of(self, sizes: _Sizes) -> tuple[PartCosts, float, RankParameters, float]:
        """`_parts` of a combination."""
        return self.parts(sizes._replace(pp=1, vp=1, dp=1, micro_batches=1))

    def bound(self, sizes: _Sizes) -> float:
        """A lower bound on the step: a stage has at least the mean work, and one at least its share of the layers."""
        costs, work_ms, _, _ = self.of(sizes)
        layer_ms = min(time.total_ms for time in costs.layer.values())
        return sizes.micro_batches * max(work_ms / sizes.pp, layer_ms * -(-self.base.model.num_layers // sizes.pp))

    def estimate(self, sizes: _Sizes) -> float:
        """Approximate step time: the lower bound, and the time to fill and drain the pipeline."""
        return self.bound(sizes) * (1 + (sizes.pp - 1) / (sizes.vp * sizes.micro_batches))

    def may_fit(self, sizes: _Sizes) -> bool:
        """A quick estimate: whether an average stage's weights and the first stage's activations fit."""
        if self.limit is None:
            return True
        cfg, (_, _, held, kept) = self.base, self.of(sizes)
        weight, gradient, optimizer = parameter_bytes(cfg, self.assume)
        sharded = cfg.ddp.use_distributed_optimizer
        dense_dp = sizes.dp * sizes.cp if sharded else 1
        expert_dp = max(1, self.world_size // (sizes.pp * sizes.ep)) if sharded else 1
        weights = held.dense * (weight + gradient + optimizer / dense_dp)
        weights += held.expert * (weight + gradient + optimizer / expert_dp)
        # A first stage keeps pp micro-batches of its layers, and with interleaving up to one more round of one chunk.
        in_flight = min(sizes.micro_batches, sizes.pp) / sizes.pp
        in_flight += (sizes.vp > 1) * (sizes.pp - 1) / (sizes.pp * sizes.vp)
        estimate = weights / sizes.pp + kept * in_flight
        self.lowest = min(self.lowest, estimate)
        return 0.9 * estimate <= self.limit

    def candidate(self, sizes: _Sizes, effort: int, to_beat_ms: float = inf) -> Candidate | None:
        """The combination with its plan; None if it is refused, does not fit, or is proven to be slower."""
        cfg = self.trial(sizes)
        try:
            cfg.finalize(self.world_size)
            planner = make_planner(RunShape.of(cfg, self.world_size), self.machine, assume=self.assume)
            choice = planner.choose(self.limit, effort, FEW_EACH, to_beat_ms)
        except (ConfigError, PlanError):
            return None
        plan = planner.plan(planner.problem().layout(choice.split))
        if self.limit is not None and plan.peak_bytes > self.limit:
            return None
        return Candidate(cfg=cfg, plan=plan, dp=sizes.dp, recompute=sizes.recompute)

    def nothing_fits(self) -> Problem:
        """What to say if no combination is left."""
        fields, devices = ("--devices", "train.global_batch_size"), self.world_size
        if self.limit is None or self.lowest == inf:
            batch = f"train.global_batch_size = {self.base.train.global_batch_size}"
            rule = f"no parallel sizes divide both the model and {batch} evenly over them"
            return Problem(fields=fields, value=devices, rule=rule, remedy=self._nearest_number())
        limit, lowest = self.limit / GIB, self.lowest / GIB
        rule = f"no sizes fit {limit:.1f} GiB; the best that divides evenly needs about {lowest:.1f} GiB on a device"
        more = _rounded_up(devices * lowest / max(limit, 1e-9))
        remedy = f"Use more devices (at least about {more}), devices with more memory, or a smaller model."
        return Problem(fields=fields[:1], value=devices, rule=rule, remedy=remedy)

    def _nearest_number(self) -> str:
        """Numbers of devices next to this one over which something divides evenly, as a sentence."""
        tps, cps, pps = self.dense_sizes()
        batch = self.base.train.global_batch_size
        parts = {tp * cp for tp, cp in product(tps, cps)}
        parts = {part * dp for part, dp in product(parts, _divisors(batch))}
        works = {part * pp for part, pp in product(parts, pps)}
        below = max((number for number in works if number < self.world_size), default=None)
        above = min((number for number in works if number > self.world_size), default=None)
        return f"Nearest that works: --devices {' or '.join(str(n) for n in (below, above) if n is not None)}."


def _step_ms(found: tuple[Candidate, _Sizes]) -> float:
    return found[0].plan.step.total_ms


def _words(sizes: _Sizes) -> str:
    return f"TP {sizes.tp}, CP {sizes.cp}, EP {sizes.ep}, PP {sizes.pp}, VP {sizes.vp}, micro-batch {sizes.micro}"


def _powers(most: int) -> list[int]:
    return [2**exponent for exponent in range(most.bit_length()) if 2**exponent <= most]


def _divisors(number: int) -> set[int]:
    small = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return {*small, *(number // divisor for divisor in small)}


def _rounded_up(devices: float) -> int:
    """The next power of two."""
    return 1 << (ceil(devices) - 1).bit_length()


def _set_sizes(cfg: ConfigContainer, sizes: _Sizes) -> None:
    cfg.model.update(
        tensor_model_parallel_size=sizes.tp,
        sequence_parallel=sizes.tp > 1,
        context_parallel_size=sizes.cp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=1 if cfg.model.num_moe_experts else None,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vp,
        pipeline_model_parallel_layout="auto",
    )
    cfg.train.micro_batch_size = sizes.micro
    cfg.validation.update(eval_micro_batch_size=None, eval_global_batch_size=None)


def recompute_fields(model: ModelConfig, name: str) -> dict[str, Any]:
    """The fields of no, selective or full recomputation, with all modules of a model that selective can recompute."""
    values: dict[str, Any] = dict.fromkeys(
        ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
    )
    if name == "full":
        return values | {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if name == "selective":
        kinds = [*moe_pattern(model), mtp_dense_width(model) is None]
        modules = ["mla_up_proj"] * model.multi_latent_attention + ["mlp"] * (not all(kinds)) + ["moe"] * any(kinds)
        return values | {"recompute_granularity": "selective", "recompute_modules": modules}
    return values
