"""The layout of a run: the one that its config writes, or for "auto" the planner's, the same on every rank and in every command.

What is planned follows from the config and the number of processes alone, never from the device at hand, so that `plan`, a dry run on a
laptop and the run itself have one layout. dist.hardware names the device that times and memory are estimated for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from megatron_mtp.config.checks.parallel import minimum_world_size
from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.layout_text import even_chunks
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.errors import PlanError
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.cost import estimate_costs
from megatron_mtp.parallel.planner.hardware import dense_peak_tflops
from megatron_mtp.parallel.planner.machines import DEFAULT_MACHINE, USABLE, Machine, find_machine
from megatron_mtp.parallel.planner.part_costs import Profile
from megatron_mtp.parallel.planner.planner import Planner, layout_of

VOCAB_SIZE = 65_536
"""Counted with where the tokenizer has not been opened yet."""


@dataclass(frozen=True, slots=True)
class AutoLayout:
    """What "auto" came to.

    Args:
        fits: False if no split fits the memory of the machine by estimate; then it is the fastest of all.
        gap: by what share another split could be faster under the estimated times; 0 is proven optimal.
    """

    layout: PipelineLayout
    machine: Machine
    fits: bool
    gap: float


_planned: dict[str, AutoLayout] = {}


def pipeline_layout(cfg: ConfigContainer, world_size: int | None = None) -> PipelineLayout:
    """Where every layer of a run sits.

    Args:
        cfg: finalized.
        world_size: processes of the job; None: the fewest that hold one replica.

    Raises:
        PlanError: the layout breaks a rule; all problems are named.
    """
    if is_planned(cfg.model):
        return auto_layout(cfg, world_size).layout
    return PipelineLayout.from_config(cfg.model)


def is_planned(model: ModelConfig) -> bool:
    """Whether there is a split to choose."""
    return model.pipeline_model_parallel_layout == "auto" and model.pipeline_model_parallel_size > 1


def auto_layout(cfg: ConfigContainer, world_size: int | None = None) -> AutoLayout:
    """The planner's choice for a config in which `is_planned`; worked out once for each config and number of processes.

    Raises:
        PlanError: there are too few layers for the chunks.
    """
    world_size = world_size or minimum_world_size(cfg.model)
    key = json.dumps([cfg.to_dict(), world_size])
    if key not in _planned:
        _planned[key] = _plan(cfg, world_size)
    return _planned[key]


def _plan(cfg: ConfigContainer, world_size: int) -> AutoLayout:
    if cfg.model.vocab_size is None:
        cfg = cfg.copy()
        cfg.model.vocab_size = VOCAB_SIZE
    machine = machine_of(cfg)
    planner = make_planner(cfg, world_size, machine)
    fits = True
    try:
        choice = planner.choose(memory_limit(machine))
    except PlanError:
        fits, choice = False, planner.choose()
    return AutoLayout(layout_of(planner.problem(), choice.split), machine, fits, choice.gap)


def machine_of(cfg: ConfigContainer) -> Machine:
    """What a config is planned for."""
    return find_machine(cfg.dist.hardware or ("cpu" if cfg.dist.device == "cpu" else DEFAULT_MACHINE))


def memory_limit(machine: Machine) -> float:
    """Bytes of one device that a plan may use."""
    return machine.memory_gib * 2**30 * USABLE


def make_planner(cfg: ConfigContainer, world_size: int, machine: Machine, profile: Profile | None = None) -> Planner:
    """A planner on measured part times, or on estimated ones."""
    if profile is not None:
        profile.check_fits(cfg)
    dtype = cfg.precision.dtype
    peak = cfg.logger.device_peak_tflops or machine.peak_tflops or dense_peak_tflops(machine.device_name, dtype)
    on_cpu = machine.name == "cpu" or (profile is not None and profile.device.lower() == "cpu")
    return Planner(
        cfg=cfg,
        costs=estimate_costs(cfg, machine, world_size) if profile is None else profile.costs,
        world_size=world_size,
        frees_outputs=not on_cpu,
        peak_tflops=peak,
        is_cpu=on_cpu,
    )


def even_layout(model: ModelConfig) -> PipelineLayout:
    """The split into equally many layers, MTP layers counted as one each.

    Raises:
        PlanError: there are too few layers for it.
    """
    pp, vp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    flat = even_chunks(model.num_layers, model.mtp_num_layers or 0, pp * vp)
    if not all(flat):
        raise PlanError("there are too few layers for an even split")
    return PipelineLayout.of_chunks(flat, pp, vp)
