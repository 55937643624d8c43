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
from megatron_mtp.config.schedules import LearningRate, WeightDecay, learning_rate, run_length_samples, weight_decay
from megatron_mtp.config.sections import ModelConfig
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
        learning_rate: as a function of the samples seen.
        weight_decay: as a function of the samples seen.
        length_samples: samples after which the run ends; None: it ends by wall-clock time only.
        router_loss_names: auxiliary losses that the routers record, under Megatron-Core's names.
    """

    layout: PipelineLayout
    planned: AutoLayout | None
    loss_factor: LossFactor
    learning_rate: LearningRate
    weight_decay: WeightDecay
    length_samples: int | None
    router_loss_names: tuple[str, ...]


def resolve(cfg: ConfigContainer, world_size: int | None = None) -> ResolvedRun:
    """Resolves a finalized config.

    Args:
        cfg: finalized for `world_size`.
        world_size: processes of the job; None: the fewest that hold one replica.

    Raises:
        PlanError: the layout breaks a rule, or there are too few layers for its chunks; all problems are named.
    """
    shape = RunShape.of(cfg, world_size)
    planned = auto_layout(shape) if is_planned(cfg.model) else None
    return ResolvedRun(
        **{field.name: getattr(shape, field.name) for field in fields(shape)},
        layout=PipelineLayout.of(cfg.model) if planned is None else planned.layout,
        planned=planned,
        loss_factor=LossFactor.parse(cfg.model.mtp_loss_scaling_factor),
        learning_rate=learning_rate(cfg),
        weight_decay=weight_decay(cfg),
        length_samples=run_length_samples(cfg),
        router_loss_names=router_loss_names(cfg.model),
    )


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
