"""Checks of what a run does about faults: bad numbers, retention of checkpoints, watchdog, exit codes."""

from __future__ import annotations

from megatron_mtp.config.blend import set_label, valid_names
from megatron_mtp.config.depths import loss_names
from megatron_mtp.config.problem import problem
from megatron_mtp.config.sections import RunConfig
from megatron_mtp.errors import Problem, nearest

TAKEN_EXIT_CODES = {
    0: "the end of the run",
    1: "a crash",
    2: "a mistake of the user",
    4: "a stop because of bad numbers",
    5: "a hung job",
    6: "a last checkpoint that could not be saved",
}
WATCHDOG_SHARE = 0.9


def watchdog_timeout_s(cfg: RunConfig) -> float:
    """Seconds without progress after which a rank ends the job; 0: no watchdog."""
    limit_s = 60 * cfg.dist.distributed_timeout_minutes
    return WATCHDOG_SHARE * limit_s if cfg.dist.watchdog_s is None else cfg.dist.watchdog_s


def fault_problems(cfg: RunConfig) -> list[Problem]:
    """Every rule of policies, retention, watchdog and exit codes."""
    return _policy_problems(cfg) + _retention_problems(cfg) + _dist_problems(cfg)


def _policy_problems(cfg: RunConfig) -> list[Problem]:
    ckpt, problems = cfg.checkpoint, []
    if cfg.train.mtp_autotune and not cfg.model.mtp_num_layers:
        rule = "with {model.mtp_num_layers=} there is no MTP loss whose factor could be changed"
        problems.append(problem(cfg, "train.mtp_autotune", rule))
    for name in (f"train.{name}" for name in ("on_nan", "on_spike") if getattr(cfg.train, name) == "rollback"):
        if ckpt.save is None or not (ckpt.save_interval or ckpt.save_interval_mins):
            rule = (
                "needs checkpoints to go back to: {checkpoint.save}, and {checkpoint.save_interval} or "
                "{checkpoint.save_interval_mins}"
            )
            problems.append(problem(cfg, name, rule))
        if not ckpt.save_optim:
            problems.append(problem(cfg, name, "needs {checkpoint.save_optim} = True"))
    return problems


def _retention_problems(cfg: RunConfig) -> list[Problem]:
    ckpt, val, problems = cfg.checkpoint, cfg.validation, []
    if ckpt.keep_best and not (val.eval_iters and (val.eval_interval or val.eval_at_end)):
        rule = "needs evaluations: {validation.eval_interval} and {validation.eval_iters}"
        problems.append(problem(cfg, "checkpoint.keep_best", rule))
    problems += _best_metric_problems(cfg)
    for name in ("save_interval_mins", "keep_every", "keep_best"):
        if getattr(ckpt, name) and ckpt.save is None:
            problems.append(problem(cfg, f"checkpoint.{name}", "has no effect without {checkpoint.save}"))
    return problems


def _best_metric_problems(cfg: RunConfig) -> list[Problem]:
    """Whether the run evaluates what its best checkpoint is chosen by."""
    try:
        sets = valid_names(cfg.dataset)
    except (ValueError, IndexError):  # the checks of the data say what is wrong with the split
        return []
    if cfg.checkpoint.keep_best and not sets:
        rule = "needs a validation set, and the run has none: {dataset.split=}, {dataset.valid_sets=}"
        return [problem(cfg, "checkpoint.keep_best", rule)]
    chosen, name = cfg.checkpoint.best_metric, "checkpoint.best_metric"
    known = [f"{set_label(one)}/{loss}" for one in sets for loss in loss_names(cfg.model.mtp_num_layers)]
    if chosen is None or chosen in known:
        return []
    rule = "is no loss that this run evaluates; those are {known}"
    return [problem(cfg, name, rule, nearest(chosen, known).strip(), known=", ".join(known) or "none")]


def _dist_problems(cfg: RunConfig) -> list[Problem]:
    dist, problems = cfg.dist, []
    limit_s = 60 * dist.distributed_timeout_minutes
    if watchdog_timeout_s(cfg) >= limit_s:
        rule = (
            f"must be below {{dist.distributed_timeout_minutes=}} ({limit_s:g} s), or a collective gives up before the "
            "stacks are written"
        )
        problems.append(problem(cfg, "dist.watchdog_s", rule))
    if 0 < dist.straggler_factor <= 1:
        problems.append(problem(cfg, "dist.straggler_factor", "must be above 1, or 0 (off)"))
    if meaning := TAKEN_EXIT_CODES.get(dist.preempted_exit_code):
        rule, remedy = f"stands for {meaning}", "Use 3, or another number up to 125."
        problems.append(problem(cfg, "dist.preempted_exit_code", rule, remedy))
    return problems
