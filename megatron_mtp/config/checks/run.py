"""Checks of a run without its model and data: length, schedules, optimizer, precision, logs, checkpoints."""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_mtp.config.problem import problem, refusal
from megatron_mtp.config.sections import RunConfig
from megatron_mtp.errors import Problem
from megatron_mtp.storage.address import is_address

UNITS = ("iters", "samples", "tokens")
MAX_RAMP_SIZES = 10_000
"""A ramp through more batch sizes is a typing mistake; the sizes become a list."""


def run_problems(cfg: RunConfig) -> list[Problem]:
    """Every rule of training, optimizer, schedule, precision, logs, checkpoints, profiling and names of callbacks."""
    problems = _length_problems(cfg) + _scheduler_problems(cfg) + _optimizer_problems(cfg) + _record_problems(cfg)
    return problems + _callback_problems(cfg)


def _length_problems(cfg: RunConfig) -> list[Problem]:
    given = [f"train.train_{unit}" for unit in UNITS if getattr(cfg.train, f"train_{unit}") is not None]
    if len(given) == 1 or (not given and cfg.train.exit_duration_in_mins is not None):
        return []
    listed = f"{' and '.join(f'{{{name}=}}' for name in given[1:])} is set too" if given else "none is set"
    rule = f"exactly one of train.train_iters, train.train_samples and train.train_tokens must be set; {listed}"
    remedy = "Set the others to null. Only train.exit_duration_in_mins can replace all of them."
    return [problem(cfg, given[0] if given else "train.train_iters", rule, remedy)]


def ramp_problems(cfg: RunConfig) -> list[Problem]:
    """Whether train.rampup_batch_size reaches train.global_batch_size; other checks count its sizes."""
    ramp, final, name = cfg.train.rampup_batch_size, cfg.train.global_batch_size, "train.rampup_batch_size"
    if ramp is None:
        return []
    if len(ramp) != 3:
        return [problem(cfg, name, "must be [start, increment, samples]")]
    start, increment, _ = ramp
    if start > final:
        return [problem(cfg, name, "starts above {train.global_batch_size=}")]
    if (final - start) % increment:
        rule = "steps of {increment} from {start} do not reach {train.global_batch_size=} exactly"
        remedy = "Choose an increment that divides {rest}."
        return [problem(cfg, name, rule, remedy, increment=increment, start=start, rest=final - start)]
    if (final - start) // increment >= MAX_RAMP_SIZES:
        rule = f"passes through more than {MAX_RAMP_SIZES} batch sizes up to {{train.global_batch_size=}}"
        return [problem(cfg, name, rule, "Choose a larger increment.")]
    return []


def _scheduler_problems(cfg: RunConfig) -> list[Problem]:
    """Learning rate and weight decay over time."""
    sched, problems = cfg.scheduler, []
    kinds = ("decay", "warmup", "wsd_decay")
    lengths = {f"scheduler.lr_{kind}_{unit}": unit for unit in UNITS for kind in kinds}
    used = {name: unit for name, unit in lengths.items() if getattr(sched, name.split(".")[1])}
    if len(set(used.values())) > 1:
        first, *others = used
        rule = f"lengths are given in {' and '.join(sorted(set(used.values())))} at once ({{others}})"
        rule = rule.replace("{others}", ", ".join(f"{{{name}=}}" for name in others))
        remedy = "Give decay, warmup and WSD lengths in one unit; set the others to null (warmup: 0)."
        problems.append(problem(cfg, first, rule, remedy))
    else:
        problems += _order_problems(cfg)
    warmups = [f"scheduler.lr_warmup_{unit}" for unit in UNITS if getattr(sched, f"lr_warmup_{unit}")]
    if sched.lr_warmup_fraction is not None and warmups:
        rule = f"a warmup length is given too: {{{warmups[0]}=}}"
        problems.append(problem(cfg, "scheduler.lr_warmup_fraction", rule, "Set one of them to null or 0."))
    if cfg.train.exit_duration_in_mins is not None:
        problems += _length_of_decay_problems(cfg)
    problems += _wsd_problems(cfg) + _weight_decay_problems(cfg)
    if sched.lr_warmup_init > cfg.optimizer.lr:
        problems.append(problem(cfg, "scheduler.lr_warmup_init", "must not be above {optimizer.lr=}"))
    return problems


def _length_of_decay_problems(cfg: RunConfig) -> list[Problem]:
    """A run that ends by wall-clock time only has no length for a decay to follow."""
    sched, problems = cfg.scheduler, []
    if any(getattr(cfg.train, f"train_{unit}") for unit in UNITS):
        return []
    has_length = any(getattr(sched, f"lr_decay_{unit}") for unit in UNITS)
    if not has_length and (sched.lr_decay_style != "constant" or sched.lr_warmup_fraction is not None):
        rule = (
            "a decay needs a length, and a run that ends by wall-clock time ({train.exit_duration_in_mins=}) has none"
        )
        remedy = "Set scheduler.lr_decay_iters (or _samples, _tokens), or use 'constant'."
        problems.append(problem(cfg, "scheduler.lr_decay_style", rule, remedy))
    if sched.weight_decay_incr_style != "constant":
        rule = (
            "weight decay moves over the complete run, and one that ends by wall-clock time "
            "({train.exit_duration_in_mins=}) has no length"
        )
        remedy = "Set train.train_iters (or _samples, _tokens), or use 'constant'."
        problems.append(problem(cfg, "scheduler.weight_decay_incr_style", rule, remedy))
    return problems


def _order_problems(cfg: RunConfig) -> list[Problem]:
    """Warmup, then decay: an explicit decay must be longer than its warmup.

    A decay over the complete run may be shorter: ten steps of a long recipe are no mistake, and `hints` says that the
    learning rate never reaches its peak.
    """
    sched = cfg.scheduler
    for unit in UNITS:
        warmup, decay = getattr(sched, f"lr_warmup_{unit}"), getattr(sched, f"lr_decay_{unit}")
        if decay is not None and warmup >= decay:
            rule = f"must be below {{scheduler.lr_decay_{unit}=}}, which includes the warmup"
            return [problem(cfg, f"scheduler.lr_warmup_{unit}", rule)]
        wsd = getattr(sched, f"lr_wsd_decay_{unit}")
        if decay is not None and wsd is not None and warmup + wsd > decay:
            rule = f"with {{scheduler.lr_warmup_{unit}=}} added is longer than {{scheduler.lr_decay_{unit}=}}"
            return [problem(cfg, f"scheduler.lr_wsd_decay_{unit}", rule)]
    return []


def _wsd_problems(cfg: RunConfig) -> list[Problem]:
    sched = cfg.scheduler
    lengths = [f"lr_wsd_decay_{unit}" for unit in UNITS if getattr(sched, f"lr_wsd_decay_{unit}") is not None]
    if sched.lr_decay_style == "WSD" and not lengths:
        rule = "needs the length of its last phase, such as {scheduler.lr_wsd_decay_iters}"
        return [problem(cfg, "scheduler.lr_decay_style", rule)]
    if sched.lr_decay_style != "WSD" and lengths:
        return [problem(cfg, f"scheduler.{lengths[0]}", "has no effect with {scheduler.lr_decay_style=}")]
    return []


def _weight_decay_problems(cfg: RunConfig) -> list[Problem]:
    sched = cfg.scheduler
    start, end = sched.start_weight_decay, sched.end_weight_decay
    if (start is None) != (end is None):
        rule = "must be set together with {scheduler.end_weight_decay=}, or neither"
        return [problem(cfg, "scheduler.start_weight_decay", rule)]
    if sched.weight_decay_incr_style == "constant" and start != end:
        rule = "differs from {scheduler.end_weight_decay=}, but {scheduler.weight_decay_incr_style=}"
        return [problem(cfg, "scheduler.start_weight_decay", rule, "Use 'linear' or 'cosine'.")]
    if sched.weight_decay_incr_style != "constant" and start is None:
        rule = "needs {scheduler.start_weight_decay} and {scheduler.end_weight_decay}"
        return [problem(cfg, "scheduler.weight_decay_incr_style", rule)]
    return []


def _optimizer_problems(cfg: RunConfig) -> list[Problem]:
    """Optimizer, gradient reduction, precision."""
    ddp, precision, problems = cfg.ddp, cfg.precision, []
    if cfg.optimizer.min_lr > cfg.optimizer.lr:
        problems.append(problem(cfg, "optimizer.min_lr", "must not be above {optimizer.lr=}"))
    if ddp.overlap_param_gather and not (ddp.use_distributed_optimizer and ddp.overlap_grad_reduce):
        rule = "needs {ddp.use_distributed_optimizer} = True and {ddp.overlap_grad_reduce} = True"
        problems.append(problem(cfg, "ddp.overlap_param_gather", rule))
    if precision.loss_scale is not None and precision.dtype != "fp16":
        rule = "only fp16 scales the loss, not {precision.dtype=}"
        problems.append(problem(cfg, "precision.loss_scale", rule, "Set it to null."))
    if precision.min_loss_scale > precision.initial_loss_scale:
        rule = "must not be above {precision.initial_loss_scale=}"
        problems.append(problem(cfg, "precision.min_loss_scale", rule))
    return problems


def _record_problems(cfg: RunConfig) -> list[Problem]:
    """Logs, checkpoints, profiling."""
    prof, problems = cfg.profiling, []
    if cfg.logger.wandb_project is not None and not cfg.logger.wandb_exp_name:
        rule = "needs {logger.wandb_exp_name}, the name of the run, or a {checkpoint.save} that is its name"
        problems.append(problem(cfg, "logger.wandb_project", rule))
    if is_address(cfg.checkpoint.save or "") and cfg.logger.log_dir is None:
        rule = "must name a folder: metrics and logs are files of this machine, and {checkpoint.save=} has none"
        problems.append(problem(cfg, "logger.log_dir", rule))
    if cfg.checkpoint.most_recent_k == 0:
        problems.append(problem(cfg, "checkpoint.most_recent_k", "must be -1 (all) or at least 1"))
    if cfg.checkpoint.exit_on_missing_checkpoint and cfg.checkpoint.load is None:
        problems.append(problem(cfg, "checkpoint.exit_on_missing_checkpoint", "needs {checkpoint.load}"))
    if prof.use_pytorch_profiler and prof.profile_dir is None:
        problems.append(problem(cfg, "profiling.use_pytorch_profiler", "needs {profiling.profile_dir}"))
    if prof.use_pytorch_profiler and prof.profile_step_start >= prof.profile_step_end:
        problems.append(problem(cfg, "profiling.profile_step_start", "must be below {profiling.profile_step_end=}"))
    return problems


def _callback_problems(cfg: RunConfig) -> list[Problem]:
    """The form of the names; what they name is imported where callbacks are known."""
    found = problem(cfg, "train.callbacks", "must be module:Class or path/file.py:Class")
    form = r"([\w.]+|.+\.py):\w+"
    return [replace(found, value=name) for name in cfg.train.callbacks if not re.fullmatch(form, name)]


def run_refusals(cfg: RunConfig) -> list[Problem]:
    """Features outside the model that are refused by name."""
    rule = "fully sharded data parallelism is not supported"
    remedy = "Use ddp.use_distributed_optimizer = True, which shards the optimizer state."
    return _muon_refusals(cfg) + [
        refusal(cfg, f"ddp.{name}", rule, remedy)
        for name in ("use_megatron_fsdp", "use_torch_fsdp2")
        if getattr(cfg.ddp, name)
    ]


def _muon_refusals(cfg: RunConfig) -> list[Problem]:
    """Megatron-Core shards Muon by whole layers, with another optimizer class, which is not connected here."""
    if cfg.optimizer.optimizer != "muon":
        return []
    refused, name = [], "optimizer.optimizer"
    if cfg.ddp.use_distributed_optimizer:
        rule = (
            "Muon reads complete matrices of gradients, and {ddp.use_distributed_optimizer=} leaves each rank the sum "
            "of its own shard only"
        )
        refused.append(refusal(cfg, name, rule, "Set ddp.use_distributed_optimizer = False."))
    if cfg.precision.dtype == "fp16":
        rule = "Megatron-Core has no Muon for {precision.dtype=}"
        refused.append(refusal(cfg, name, rule, "Use 'bf16' or 'fp32'."))
    return refused
