"""`resolve(cfg, world_size)` turns a finalized config into the `ResolvedRun` that builds, runs or shows it.

Resolved are the pipeline layout (planned where the config says "auto"), the grid of ranks, the MTP depths, the kind of
each layer, and learning rate, weight decay and MTP loss factor as functions of the run's position. Training, the dry
run, `verify`, `profile` and decoding resolve once and hand the result to what they build; `show` prints the layout.
The result does not depend on the device at hand: a laptop and a cluster get the same. Imports neither torch nor
Megatron-Core.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.loss_factor import LossFactor
from megatron_mtp.config.schedules import LearningRate, WeightDecay, learning_rate, weight_decay
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.config.timeline import Phase, ScheduleClock, Timeline
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.auto_layout import AutoLayout, auto_layout, is_planned
from megatron_mtp.parallel.shape import RunShape


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRun(RunShape):
    """A run before anything is built: its shape, its layout and its schedules.

    Args:
        layout: where every layer sits.
        planned: what the planner found; None where the config gives the layout.
        loss_factor: MTP loss factor as a function of the tokens seen.
        learning_rate: as a function of `clock`.
        weight_decay: as a function of `clock`.
        length_samples: samples after which the run ends; None: it ends by wall-clock time only.
        timeline: the phases of the run.
        phase_index: of the phase that `cfg` is for.
        router_loss_names: auxiliary losses that the routers record, under Megatron-Core's names.
    """

    layout: PipelineLayout
    planned: AutoLayout | None
    loss_factor: LossFactor
    learning_rate: LearningRate
    weight_decay: WeightDecay
    length_samples: int | None
    router_loss_names: tuple[str, ...]
    timeline: Timeline[ConfigContainer]
    phase_index: int = 0

    @property
    def phase(self) -> Phase[ConfigContainer]:
        """The phase that this is for."""
        return self.timeline.phases[self.phase_index]

    @property
    def clock(self) -> ScheduleClock:
        """What learning rate and weight decay depend on; without phases, the samples seen."""
        return ScheduleClock(self.timeline, self.phase.schedule_from)

    @property
    def data_start(self) -> int:
        """Samples that the run had read when the order of its data began."""
        return self.timeline.phases[self.phase.data_from].start.data

    @property
    def order_samples(self) -> int | None:
        """Samples that the order of the data gives before another one begins or the run ends; None: it does not end."""
        end = self.timeline.end_of_order(self.phase_index)
        return None if end is None else max(0, end - self.timeline.phases[self.phase.data_from].start.samples)

    @property
    def batch_start(self) -> int:
        """Samples that the run had read when the growth of its global batch began."""
        return self.timeline.phases[self.phase.batch_from].start.data


def resolve(
    cfg: ConfigContainer,
    world_size: int | None = None,
    timeline: Timeline[ConfigContainer] | None = None,
    phase_index: int = 0,
) -> ResolvedRun:
    """Resolves a finalized config.

    Args:
        cfg: finalized for `world_size`; with phases, what holds before the first of them.
        world_size: processes of the job; None: the fewest that hold one replica.
        timeline: with the phase that `cfg` is for; None: that of `cfg`, before any phase has begun.
        phase_index: of that phase.

    Raises:
        PlanError: the layout breaks a rule, or there are too few layers for its chunks; all problems are named.
    """
    shape = RunShape.of(cfg, world_size)
    planned = auto_layout(shape) if is_planned(cfg.model) else None
    timeline = Timeline.of(cfg) if timeline is None else timeline
    clock = ScheduleClock(timeline, timeline.phases[phase_index].schedule_from)
    return ResolvedRun(
        **{field.name: getattr(shape, field.name) for field in fields(shape)},
        layout=PipelineLayout.of(cfg.model) if planned is None else planned.layout,
        planned=planned,
        loss_factor=LossFactor.parse(cfg.model.mtp_loss_scaling_factor),
        learning_rate=learning_rate(cfg, clock),
        weight_decay=weight_decay(cfg, clock),
        length_samples=timeline.end_samples(),
        router_loss_names=router_loss_names(cfg.model),
        timeline=timeline,
        phase_index=phase_index,
    )


def resolve_phase(timeline: Timeline[ConfigContainer], index: int, world_size: int | None = None) -> ResolvedRun:
    """Resolves one phase of a run. Arguments and errors as `resolve`."""
    return resolve(timeline.phases[index].cfg.copy().finalize(world_size), world_size, timeline, index)


def router_loss_names(model: ModelConfig) -> tuple[str, ...]:
    """Auxiliary losses that the routers of a model record, under Megatron-Core's names."""
    if not model.num_moe_experts:
        return ()
    balancing = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}
    names = []
    if model.moe_aux_loss_coeff and model.moe_router_load_balancing_type in balancing:
        names.append(balancing[model.moe_router_load_balancing_type])
    if model.moe_z_loss_coeff:
        names.append("z_loss")
    return tuple(names)
