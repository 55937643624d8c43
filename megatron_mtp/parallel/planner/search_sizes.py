"""Ranks parallel sizes, micro-batch sizes and recomputation for a number of devices, each with its best split that fits.

Every combination that divides evenly has a floor for its step, and with the time to fill and drain the pipeline a guess. They are planned
in the order of the guess, those left out whose floor is above the best so far, until the effort is spent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.errors import ConfigError, PlanError
from megatron_mtp.parallel.params import moe_pattern
from megatron_mtp.parallel.planner.activations import Activations
from megatron_mtp.parallel.planner.cost import DTYPE_BYTES, estimate_costs, layer_kinds, layer_times
from megatron_mtp.parallel.planner.hardware import dense_peak_tflops
from megatron_mtp.parallel.planner.machines import Machine
from megatron_mtp.parallel.planner.part_costs import PartCosts
from megatron_mtp.parallel.planner.planner import Plan, Planner, layout_of
from megatron_mtp.parallel.planner.stage_memory import MOMENT_BYTES
from megatron_mtp.parallel.rank_params import RankParameters, layer_rank_parameters, mtp_rank_parameters

MOST_PLANNED = 40
"""Combinations whose splits are looked at; DeepSeek-V3 on 1024 devices has thousands that divide evenly."""
NEAR = 1.05
"""Combinations whose guess is above the last row of the table by this factor are not looked at. A guess is rarely above what the simulation comes to."""
SPLITS_EACH, FEW_EACH = 12, 3000
"""Effort for each of them, see `best_split`."""
REFINED, SPLITS_REFINED = 4, 40
"""So many of the best are planned again with this effort; the caller plans the very best with full effort."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    tp: int
    cp: int
    ep: int
    pp: int
    vp: int
    dp: int
    micro: int
    count: int
    recompute: str


def search_sizes(
    cfg: ConfigContainer, machine: Machine, world_size: int, limit_bytes: float | None, top: int = 10
) -> list[Candidate]:
    """The fastest combinations that fit, best first; one row for each set of sizes, with its cheapest recomputation that fits.

    Args:
        cfg: not finalized; its model, sequence length and global batch are kept, its parallel sizes are not.
        limit_bytes: memory of one device; None: no limit.

    Raises:
        PlanError: nothing fits.
    """
    base = cfg.copy()
    for name, value in _sizes_of(base.model, 1, 1, 1, 1, 1).items():
        setattr(base.model, name, value)
    base.train.micro_batch_size = 1
    base.validation.eval_micro_batch_size = base.validation.eval_global_batch_size = None
    base.finalize()
    search = _Search(base, machine, world_size, limit_bytes)
    found = search.run(top)
    if not found:
        raise PlanError(search.nothing_fits())
    return found


class _Search:
    def __init__(self, base: ConfigContainer, machine: Machine, world_size: int, limit_bytes: float | None):
        self.base, self.machine, self.world_size, self.limit = base, machine, world_size, limit_bytes
        self.peak = base.logger.device_peak_tflops or machine.peak_tflops
        self.peak = self.peak or dense_peak_tflops(machine.device_name, base.precision.dtype)
        self.least = float("inf")
        self.tried = 0
        self.parts = cache(self._parts)

    def run(self, top: int) -> list[Candidate]:
        """Best first."""
        ranked = sorted((self.guess(sizes), idx, sizes) for idx, sizes in enumerate(self.combinations()))
        found: dict[tuple, Candidate] = {}
        sizes_of: dict[tuple, _Sizes] = {}
        planned = 0
        for guess_ms, _, sizes in ranked:
            times = sorted(candidate.plan.step.total_ms for candidate in found.values())
            key = (sizes.tp, sizes.cp, sizes.ep, sizes.pp, sizes.vp, sizes.micro)
            if len(times) >= top and guess_ms >= NEAR * times[top - 1]:
                break
            if key in found or (len(times) >= top and self.floor(sizes) >= times[top - 1]) or not self.may_fit(sizes):
                continue
            planned += 1
            slowest_ms = times[top - 1] if len(times) >= top else float("inf")
            if (candidate := self.candidate(sizes, SPLITS_EACH, slowest_ms)) is not None:
                found[key], sizes_of[key] = candidate, sizes
            if planned >= MOST_PLANNED:
                break
        for key in sorted(found, key=lambda key: found[key].plan.step.total_ms)[:REFINED]:
            candidate = self.candidate(sizes_of[key], SPLITS_REFINED)
            if candidate is not None and candidate.plan.step.total_ms < found[key].plan.step.total_ms:
                found[key] = candidate
        return sorted(found.values(), key=lambda candidate: candidate.plan.step.total_ms)[:top]

    def combinations(self) -> Iterator[_Sizes]:
        """Everything that divides evenly."""
        model, world, batch = self.base.model, self.world_size, self.base.train.global_batch_size
        chunks_at_most = model.num_layers + 2 + (1 if model.mtp_num_layers else 0)
        tps = [tp for tp in _powers(self.machine.node_size) if model.num_attention_heads % tp == 0]
        cps = [cp for cp in _powers(8) if model.seq_length % (2 * cp) == 0 and model.seq_length // cp >= 4096] or [1]
        eps = [ep for ep in _powers(world) if (model.num_moe_experts or 1) % ep == 0]
        pps = [pp for pp in range(1, min(world, chunks_at_most) + 1) if world % pp == 0]
        for tp, cp, pp in product(tps, cps, pps):
            if world % (tp * cp * pp):
                continue
            dp = world // (tp * cp * pp)
            for ep, micro in product(eps, (1, 2, 4, 8)):
                if (world // pp) % ep or batch % (micro * dp):
                    continue
                count = batch // (micro * dp)
                for vp in (1, 2, 3, 4) if pp > 1 and count % pp == 0 else (1,):
                    for recompute in ("none", "selective", "full") if pp * vp <= chunks_at_most else ():
                        yield _Sizes(
                            tp=tp, cp=cp, ep=ep, pp=pp, vp=vp, dp=dp, micro=micro, count=count, recompute=recompute
                        )

    def trial(self, sizes: _Sizes) -> ConfigContainer:
        """The config of a combination, not finalized."""
        trial = self.base.copy()
        values = _sizes_of(trial.model, sizes.tp, sizes.cp, sizes.ep, sizes.pp, sizes.vp) | _recompute(
            trial.model, sizes.recompute
        )
        for name, value in values.items():
            setattr(trial.model, name, value)
        trial.train.micro_batch_size = sizes.micro
        trial.validation.eval_micro_batch_size = trial.validation.eval_global_batch_size = None
        return trial

    def _parts(
        self, tp: int, cp: int, ep: int, micro: int, recompute: str
    ) -> tuple[PartCosts, float, RankParameters, float]:
        """(part times, work of a micro-batch, parameters on a block, kept activations), whatever the pipeline.

        The block is one replica's ranks over all stages together; activations are those of all layers.
        """
        sizes = _Sizes(tp=tp, cp=cp, ep=ep, pp=1, vp=1, dp=1, micro=micro, count=1, recompute=recompute)
        trial = self.trial(sizes)
        model, depths = trial.model, trial.model.mtp_num_layers or 0
        costs = estimate_costs(trial, self.machine, self.world_size)
        times = [*layer_times(costs, model), costs.embedding, costs.head]
        times += [costs.mtp_layer] * depths + [costs.mtp_head] * depths
        kinds = layer_kinds(model)
        held = RankParameters(dense=0)
        for kind in kinds:
            held += layer_rank_parameters(model, "moe" in kind, is_linear="linear" in kind)
        for _ in range(min(1, depths) if model.mtp_use_repeated_layer else depths):
            held += mtp_rank_parameters(model)
        on_cpu = self.machine.name == "cpu"
        activations = Activations(trial, on_cpu, uses_te=not on_cpu and model.backend != "torch")
        kept = sum(activations.layer(kind) for kind in kinds)
        return costs, sum(t.forward_ms + t.backward_ms for t in times), held, kept

    def of(self, sizes: _Sizes) -> tuple[PartCosts, float, RankParameters, float]:
        """`_parts` of a combination."""
        return self.parts(sizes.tp, sizes.cp, sizes.ep, sizes.micro, sizes.recompute)

    def floor(self, sizes: _Sizes) -> float:
        """No split is faster: the work of a step spread over its stages, of which one holds at least its share of whole layers."""
        costs, work_ms, _, _ = self.of(sizes)
        layer_ms = min(time.forward_ms + time.backward_ms for time in costs.layer.values())
        return sizes.count * max(work_ms / sizes.pp, layer_ms * -(-self.base.model.num_layers // sizes.pp))

    def guess(self, sizes: _Sizes) -> float:
        """About the step: the floor, and the time to fill and drain the pipeline."""
        return self.floor(sizes) * (1 + (sizes.pp - 1) / (sizes.vp * sizes.count))

    def may_fit(self, sizes: _Sizes) -> bool:
        """Whether an average stage's weights, and the layers' activations that the first stage keeps, leave room. About right, cheap."""
        if self.limit is None:
            return True
        cfg, (_, _, held, kept) = self.base, self.of(sizes)
        item = DTYPE_BYTES[cfg.precision.dtype]
        state = MOMENT_BYTES[cfg.optimizer.optimizer] + (0 if item == 4 else 4)
        each = item + (4 if cfg.precision.grad_reduce_in_fp32 else item)
        sharded = cfg.ddp.use_distributed_optimizer
        dense_dp = sizes.dp * sizes.cp if sharded else 1
        expert_dp = max(1, self.world_size // (sizes.pp * sizes.ep)) if sharded else 1
        weights = held.dense * (each + state / dense_dp) + held.expert * (each + state / expert_dp)
        # A first stage holds pp micro-batches of its layers, and with interleaving up to one more round of one chunk.
        in_flight = min(sizes.count, sizes.pp) / sizes.pp + (sizes.vp > 1) * (sizes.pp - 1) / (sizes.pp * sizes.vp)
        estimate = weights / sizes.pp + kept * in_flight
        self.least = min(self.least, estimate)
        return 0.9 * estimate <= self.limit

    def candidate(self, sizes: _Sizes, effort: int, slowest_ms: float = float("inf")) -> Candidate | None:
        """The combination's plan; None if it is refused or does not fit, or is proven to be slower."""
        cfg = self.trial(sizes)
        try:
            cfg.finalize(self.world_size)
            planner = Planner(
                cfg=cfg,
                costs=estimate_costs(cfg, self.machine, self.world_size),
                world_size=self.world_size,
                frees_outputs=self.machine.frees_outputs,
                peak_tflops=self.peak,
                is_cpu=self.machine.name == "cpu",
            )
            choice = planner.choose(self.limit, effort, FEW_EACH, slowest_ms)
        except (ConfigError, PlanError):
            return None
        plan = planner.plan(layout_of(planner.problem(), choice.split))
        if self.limit is not None and plan.peak_bytes > self.limit:
            return None
        return Candidate(cfg=cfg, plan=plan, dp=sizes.dp, recompute=sizes.recompute)

    def nothing_fits(self) -> str:
        """The message when no combination is left."""
        batch, limit = self.base.train.global_batch_size, (self.limit or 0) / 2**30
        if self.least == float("inf"):
            return (
                f"--devices {self.world_size}: no parallel sizes divide both the model and train.global_batch_size = {batch} evenly over "
                f"them. {self._nearest_number()}"
            )
        more = self.world_size
        return (
            f"--devices {more}: no sizes fit {limit:.1f} GiB; the best that divides evenly needs about {self.least / 2**30:.1f} GiB "
            f"on a device. Use more devices (at least about {_rounded_up(more * self.least / 2**30 / max(limit, 1e-9))}), "
            "devices with more memory, or a smaller model."
        )

    def _nearest_number(self) -> str:
        """Numbers of devices next to this one over which something divides evenly, as a sentence."""
        world = self.world_size

        def divides(number: int) -> bool:
            return next(_Search(self.base, self.machine, number, self.limit).combinations(), None) is not None

        below = next(filter(divides, range(world - 1, 0, -1)), None)
        above = next(filter(divides, range(world + 1, 2 * world + 1)), None)
        return f"Nearest that works: --devices {' or '.join(str(n) for n in (below, above) if n is not None)}."


def _powers(most: int) -> list[int]:
    return [2**exponent for exponent in range(most.bit_length()) if 2**exponent <= most]


def _rounded_up(devices: float) -> int:
    return next(size for size in _powers(2**40) if size >= devices)


def _sizes_of(model: ModelConfig, tp: int, cp: int, ep: int, pp: int, vp: int) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "context_parallel_size": cp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1 if model.num_moe_experts else None,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp if vp > 1 else None,
        "pipeline_model_parallel_layout": "auto",
    }


def _recompute(model: ModelConfig, name: str) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(
        ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
    )
    if name == "full":
        return values | {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if name == "selective":
        kinds = moe_pattern(model)
        modules = ["mla_up_proj"] * model.multi_latent_attention + ["mlp"] * (not all(kinds)) + ["moe"] * any(kinds)
        return values | {"recompute_granularity": "selective", "recompute_modules": modules}
    return values
