"""From what a user wrote to what a run uses: types, derived values, every check, and then nothing may change."""

from __future__ import annotations

from dataclasses import fields

from megatron_mtp.config.base import Section
from megatron_mtp.config.checks import data as check_data
from megatron_mtp.config.checks import faults as check_faults
from megatron_mtp.config.checks import model as check_model
from megatron_mtp.config.checks import pairs as check_pairs
from megatron_mtp.config.checks import parallel as check_parallel
from megatron_mtp.config.checks import run as check_run
from megatron_mtp.config.coerce import MisfitError, check, field_types
from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.derive import derive, read_token_counts
from megatron_mtp.config.mcore.rules import mcore_problems
from megatron_mtp.errors import ConfigError, UnsupportedError


def finalize(cfg: ConfigContainer, world_size: int | None = None) -> ConfigContainer:
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
    mistakes, refused = find_problems(trial, world_size)
    if mistakes:
        raise ConfigError(mistakes + refused)
    if refused:
        raise UnsupportedError(refused)
    if not cfg.is_frozen:
        _take_over(cfg, trial)
        cfg.freeze()
    return cfg


def find_problems(trial: ConfigContainer, world_size: int | None = None) -> tuple[list[str], list[str]]:
    """Derives in place and returns mistakes and refusals.

    A value of the wrong type or out of range is reported and replaced by one that is not, so that the other checks can
    run; what they then say about that field is left out.
    """
    misfits = _type_problems(trial)
    if any(not isinstance(getattr(trial, name), kind) for name, kind in field_types(ConfigContainer).items()):
        return list(misfits.values()), []
    found = read_token_counts(trial)
    misfits |= check_model.range_problems(trial.model, check_model.POSITIVE, check_model.NOT_NEGATIVE)
    misfits |= check_run.run_range_problems(trial)
    found += derive(trial)
    refused = check_model.refused_in_model(trial.model) + check_run.refused_in_run(trial)
    refused += check_pairs.refused_pairs(trial)
    in_mcore, refused_in_mcore = mcore_problems(trial.model)
    found += in_mcore + _cross_problems(trial, world_size)
    found = [problem for problem in found if not any(name in problem for name in misfits)]
    return list(dict.fromkeys([*misfits.values(), *found])), refused + refused_in_mcore


def _cross_problems(cfg: ConfigContainer, world_size: int | None) -> list[str]:
    """Checks across fields; they may divide by any size."""
    model = cfg.model
    problems = check_model.architecture_problems(model) + check_model.moe_problems(model)
    problems += check_model.mtp_problems(model)
    problems += check_parallel.placement_problems(model) + check_parallel.recompute_problems(model)
    length = check_run.length_problems(cfg)
    problems += length + check_run.scheduler_problems(cfg) + check_run.optimizer_problems(cfg)
    problems += check_data.data_problems(cfg) + check_run.record_problems(cfg) + check_faults.fault_problems(cfg)
    if not any("rampup_batch_size" in problem for problem in length):
        if world_size is None:
            problems += check_parallel.batch_problems(cfg, None)
        else:
            problems += check_parallel.world_problems(cfg, world_size)
    return problems


def _type_problems(cfg: ConfigContainer) -> dict[str, str]:
    problems = {}
    for name, kind in field_types(ConfigContainer).items():
        section = getattr(cfg, name)
        if not isinstance(section, kind):
            problems[name] = f"{name} = {section!r}: must be a {kind.__name__}."
            continue
        for field_name, wanted in field_types(kind).items():
            value = getattr(section, field_name)
            try:
                setattr(section, field_name, check(value, wanted))
            except MisfitError as misfit:
                problems[f"{name}.{field_name}"] = f"{name}.{field_name} = {value!r}: {misfit}."
                default = getattr(kind(), field_name)
                is_size = wanted is int and default == 0  # a recipe must give it; later checks divide by it
                setattr(section, field_name, 1 if is_size else default)
    return problems


def _take_over(target: Section, source: Section) -> None:
    for field in fields(target):  # type: ignore[arg-type]
        value = getattr(source, field.name)
        if isinstance(value, Section):
            _take_over(getattr(target, field.name), value)
        else:
            setattr(target, field.name, value)
