"""What the planner chooses for `model.pipeline_model_parallel_layout = "auto"`.

The choice follows from the config and the number of processes alone, never from the device at hand, so that `plan`, a
dry run on a laptop and the run itself have one layout. dist.hardware names the device that times and memory are
estimated for. A run asks once, in `parallel.resolve`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.machines import DEFAULT_MACHINE, Machine, find_machine
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.errors import PlanError
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.assume import NOTHING, Assumptions
from megatron_mtp.parallel.planner.cost import estimate_costs
from megatron_mtp.parallel.planner.part_costs import Profile
from megatron_mtp.parallel.planner.planner import Planner
from megatron_mtp.parallel.shape import RunShape

VOCAB_SIZE = 65_536
"""Vocabulary size of the estimates before the tokenizer has been opened."""


@dataclass(frozen=True, slots=True)
class AutoLayout:
    """The planner's choice.

    Args:
        machine: the device that was planned for.
        fits: False if no split fits the machine's memory by estimate; then this one is the fastest of all.
        gap: share by which another split could be faster under the estimated times; 0 is proven optimal.
    """

    layout: PipelineLayout
    machine: Machine
    fits: bool
    gap: float


def is_planned(model: ModelConfig) -> bool:
    """Whether the planner chooses the layout."""
    return model.pipeline_model_parallel_layout == "auto" and model.pipeline_model_parallel_size > 1


def auto_layout(shape: RunShape) -> AutoLayout:
    """The planner's choice for a config in which `is_planned`.

    Raises:
        PlanError: there are too few layers for the chunks.
    """
    if shape.cfg.model.vocab_size is None:
        cfg = shape.cfg.copy()
        cfg.model.vocab_size = VOCAB_SIZE
        shape = RunShape.of(cfg, shape.world_size)
    machine = machine_of(shape.cfg)
    planner = make_planner(shape, machine)
    fits = True
    try:
        choice = planner.choose(machine.usable_bytes)
    except PlanError:
        fits, choice = False, planner.choose()
    return AutoLayout(planner.problem().layout(choice.split), machine, fits, choice.gap)


def machine_of(cfg: ConfigContainer) -> Machine:
    """The device that a config is planned for."""
    return find_machine(cfg.dist.hardware or ("cpu" if cfg.dist.device == "cpu" else DEFAULT_MACHINE))


def make_planner(
    shape: RunShape, machine: Machine, profile: Profile | None = None, assume: Assumptions = NOTHING
) -> Planner:
    """A planner on measured part times, or on estimated ones."""
    cfg = shape.cfg
    if profile is not None:
        profile.check_fits(shape)
    on_cpu = machine.is_cpu or (profile is not None and profile.device.lower() == "cpu")
    return Planner(
        shape=shape,
        costs=estimate_costs(shape, machine, assume) if profile is None else profile.costs,
        peak_tflops=cfg.logger.device_peak_tflops or machine.peaks.of(cfg.precision.dtype),
        is_cpu=on_cpu,
        assume=assume,
    )
