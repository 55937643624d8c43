"""Applies the phases of a config: the config of each is that of the run with the phases up to it, in their order."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_mtp.config.checks.parallel import minimum_world_size
from megatron_mtp.config.derive import derive
from megatron_mtp.config.phases import Overlay, read_phases
from megatron_mtp.config.sections import RunConfig
from megatron_mtp.config.serialize import fitted, section_of
from megatron_mtp.errors import ConfigError, Problem

FOLLOWING = (
    ("dataset", "seq_length"),
    ("validation", "eval_micro_batch_size"),
    ("validation", "eval_global_batch_size"),
    ("model", "expert_tensor_parallel_size"),
    ("model", "recompute_modules"),
)
"""Derived fields whose sources a phase may change. They follow those in each phase, unless a phase or the run sets them
to something else."""


def before_phases[C: RunConfig](cfg: C) -> C:
    """The config of the part before the first phase: a copy without phases."""
    base = cfg.copy()
    base.phases, base.checkpoint.enter_phase = {}, None
    return base


def overlaid[C: RunConfig](cfg: C) -> Iterator[tuple[Overlay, C, list[Problem]]]:
    """Each phase with its config, which is not finalized and has no phases itself, and values that fit no field.

    Args:
        cfg: finalized, or at least derived, and its phases have the right form.
    """
    present = before_phases(cfg)
    for overlay in read_phases(cfg)[0]:
        following = _following(present)
        present = present.copy()
        for owner, name in following:
            setattr(getattr(present, owner), name, None)
        problems: list[Problem] = []
        for section_name, values in overlay.changes.items():
            section = section_of(present, section_name)
            for name, value in values.items():
                try:
                    setattr(section, name, fitted(section, name, value))
                except ConfigError as error:
                    problems += error.problems
        yield overlay, present, problems
        present = present.copy()
        derive(present)


def _following(cfg: RunConfig) -> list[tuple[str, str]]:
    """Fields of FOLLOWING that have the value that `derive` would give them."""
    plain = cfg.copy()
    for section, name in FOLLOWING:
        setattr(getattr(plain, section), name, None)
    derive(plain)
    return [(s, n) for s, n in FOLLOWING if getattr(getattr(plain, s), n) == getattr(getattr(cfg, s), n)]


def phase_configs[C: RunConfig](cfg: C) -> list[tuple[Overlay, C]]:
    """The config of each phase, derived and not finalized, for a config that is finalized."""
    found = []
    for overlay, present, _ in overlaid(cfg):
        derive(present)
        found.append((overlay, present))
    return found


def fewest_processes(cfg: RunConfig) -> int:
    """The fewest processes that hold one replica in every phase of a finalized config."""
    return math.lcm(minimum_world_size(cfg.model), *(minimum_world_size(own.model) for _, own in phase_configs(cfg)))
