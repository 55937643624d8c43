"""From what a user wrote to what a run uses: types, ranges, derived values, checks; then nothing may change."""

from __future__ import annotations

from dataclasses import fields, replace

from megatron_mtp.config.base import Section
from megatron_mtp.config.checks.data import data_problems
from megatron_mtp.config.checks.faults import fault_problems
from megatron_mtp.config.checks.model import model_problems, model_refusals
from megatron_mtp.config.checks.pairs import pair_refusals
from megatron_mtp.config.checks.parallel import batch_problems, placement_problems, rank_order_problems, world_problems
from megatron_mtp.config.checks.run import ramp_problems, run_problems, run_refusals
from megatron_mtp.config.coerce import MisfitError, check, field_types
from megatron_mtp.config.derive import derive, read_token_counts
from megatron_mtp.config.knob import broken_rule, range_of
from megatron_mtp.config.mcore.rules import mcore_problems
from megatron_mtp.config.phase_configs import overlaid
from megatron_mtp.config.phases import read_phases
from megatron_mtp.config.sections import RunConfig, section_types
from megatron_mtp.config.timeline import Timeline
from megatron_mtp.errors import ConfigError, Problem, UnsupportedError


def finalize[C: RunConfig](cfg: C, world_size: int | None = None) -> C:
    """Derives, checks across fields and freezes `cfg` in place; a finalized config may be checked again.

    Args:
        world_size: number of ranks; None skips the checks that need it.

    Returns:
        `cfg` itself.

    Raises:
        ConfigError: every problem found; `cfg` is then as it was. UnsupportedError if all of them are refusals of
            combinations that are not built.
    """
    trial = cfg.copy()
    if problems := find_problems(trial, world_size) or _phase_problems(trial, world_size):
        raise (UnsupportedError if all(found.is_refusal for found in problems) else ConfigError)(problems)
    if not cfg.is_frozen:
        _take_over(cfg, trial)
        cfg.freeze()
    return cfg


def find_problems(trial: RunConfig, world_size: int | None = None) -> list[Problem]:
    """Derives in place and returns what is wrong, mistakes before refusals, each once.

    A value of the wrong type or outside its range is reported and replaced by one that fits, so that the other checks
    can run; what they find with that field is left out.
    """
    misfits = _type_problems(trial)
    if any(not isinstance(getattr(trial, name), kind) for name, kind in section_types().items()):
        return misfits
    unread = read_token_counts(trial)
    misfits += unread + _value_problems(trial)
    found = derive(trial)
    derived = _value_problems(trial, are_derived=True)
    misfits = misfits or derived  # with misfits, it may follow from what replaces one
    found += mcore_problems(trial.model) + model_problems(trial.model)
    found += placement_problems(trial.model) + rank_order_problems(trial)
    found += run_problems(trial) + data_problems(trial) + fault_problems(trial)
    if trial.dist.hardware is not None:
        from megatron_mtp.config.machines import hardware_problems  # its table would add 5 % to the time of `show`

        found += hardware_problems(trial.dist.hardware)
    ramp = ramp_problems(trial)
    if not ramp:  # else its batch sizes cannot be counted
        found += batch_problems(trial, None) if world_size is None else world_problems(trial, world_size)
    found += ramp + model_refusals(trial.model) + run_refusals(trial) + pair_refusals(trial)
    wrong = {misfit.fields[0] for misfit in misfits}
    misfits += [problem for problem in found if wrong.isdisjoint(problem.fields)]
    unique = {str(problem): problem for problem in misfits}
    return sorted(unique.values(), key=lambda problem: problem.is_refusal)


def _phase_problems(cfg: RunConfig, world_size: int | None) -> list[Problem]:
    """What is wrong with the phases of a config that is right without them. Mistakes in their form come first."""
    _, problems = read_phases(cfg)
    if problems or not cfg.phases:
        return problems
    seen: set[str] = set()
    for overlay, trial, misfits in overlaid(cfg):
        found = [problem for problem in misfits or find_problems(trial, world_size) if str(problem) not in seen]
        seen |= set(map(str, found))
        problems += [replace(problem, where=f"phases.{overlay.name}") for problem in found]
    for field in ("save_optim", "load_optim"):
        if not getattr(cfg.checkpoint, field):
            rule, remedy = "a run with phases goes on from its checkpoints, optimizer included", "Set it to True."
            problems.append(Problem(fields=(f"checkpoint.{field}",), value=False, rule=rule, remedy=remedy))
    return problems or Timeline.of(cfg).problems()


def _type_problems(cfg: RunConfig) -> list[Problem]:
    problems = []
    for name, kind in section_types().items():
        section = getattr(cfg, name)
        if not isinstance(section, kind):
            problems.append(Problem(fields=(name,), value=section, rule=f"must be a {kind.__name__}"))
            continue
        for field_name, wanted in field_types(kind).items():
            value = getattr(section, field_name)
            try:
                setattr(section, field_name, check(value, wanted))
            except MisfitError as misfit:
                problems.append(Problem(fields=(f"{name}.{field_name}",), value=value, rule=str(misfit)))
                setattr(section, field_name, _fitting(kind, field_name))
    return problems


def _value_problems(cfg: RunConfig, are_derived: bool = False) -> list[Problem]:
    """Values that break the rules of their own field; entries of a mapping are reported and removed one by one."""
    problems = []
    remedy = "It follows from other fields: change those, or set it." if are_derived else ""
    for name, kind in section_types().items():
        section = getattr(cfg, name)
        for field_name in field_types(kind):
            value = getattr(section, field_name)
            if value is None or isinstance(value, bool):
                continue
            field = f"{name}.{field_name}"
            if isinstance(value, dict):
                broken = {key: rule for key, item in value.items() if (rule := broken_rule(kind, field_name, item))}
                for key, rule in broken.items():
                    problems.append(Problem(fields=(f"{field}.{key}",), value=value.pop(key), rule=rule, remedy=remedy))
            elif rule := broken_rule(kind, field_name, value):
                problems.append(Problem(fields=(field,), value=value, rule=rule, remedy=remedy))
                setattr(section, field_name, _fitting(kind, field_name, needs_number=are_derived))
    return problems


def _fitting(kind: type[Section], name: str, needs_number: bool = False) -> object:
    """A value in place of one that does not fit: the default, or the lowest of the range if a recipe must set it."""
    default, limits = getattr(kind(), name), range_of(kind, name)
    return default if limits is None or (limits.holds(default) and not needs_number) else limits.lowest


def _take_over(target: Section, source: Section) -> None:
    for field in fields(target):  # type: ignore[arg-type]
        value = getattr(source, field.name)
        if isinstance(value, Section):
            _take_over(getattr(target, field.name), value)
        else:
            setattr(target, field.name, value)
