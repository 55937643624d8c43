"""Checks of what a run does about faults: bad numbers, retention of checkpoints, watchdog, exit codes."""

from __future__ import annotations

from megatron_mtp.config.container import ConfigContainer

TAKEN_EXIT_CODES = {
    0: "the end of the run",
    1: "a crash",
    2: "a mistake of the user",
    4: "a stop because of bad numbers",
    5: "a hung job",
}
WATCHDOG_SHARE = 0.9


def watchdog_timeout_s(cfg: ConfigContainer) -> float:
    """Seconds without progress after which a rank ends the job; 0: no watchdog."""
    limit_s = 60 * cfg.dist.distributed_timeout_minutes
    return WATCHDOG_SHARE * limit_s if cfg.dist.watchdog_s is None else cfg.dist.watchdog_s


def fault_problems(cfg: ConfigContainer) -> list[str]:
    """Policies, retention, watchdog, exit codes."""
    return _policy_problems(cfg) + _retention_problems(cfg) + _dist_problems(cfg)


def _policy_problems(cfg: ConfigContainer) -> list[str]:
    ckpt, problems = cfg.checkpoint, []
    for name in ("on_nan", "on_spike"):
        if getattr(cfg.train, name) != "rollback":
            continue
        if ckpt.save is None or not (ckpt.save_interval or ckpt.save_interval_mins):
            problems.append(
                f"train.{name} = 'rollback': needs checkpoints to go back to. Set checkpoint.save and checkpoint.save_interval "
                "(or checkpoint.save_interval_mins)."
            )
        if not ckpt.save_optim:
            problems.append(f"train.{name} = 'rollback': needs checkpoint.save_optim = True, which is False.")
    if cfg.train.spike_window < 4:
        problems.append(f"train.spike_window = {cfg.train.spike_window}: must be at least 4, to tell a spread.")
    return problems


def _retention_problems(cfg: ConfigContainer) -> list[str]:
    ckpt, problems = cfg.checkpoint, []
    if ckpt.keep_best and not (
        cfg.validation.eval_iters and (cfg.validation.eval_interval or cfg.validation.eval_at_end)
    ):
        problems.append(
            f"checkpoint.keep_best = {ckpt.keep_best}: needs evaluations. Set validation.eval_interval and validation.eval_iters."
        )
    for name in ("save_interval_mins", "keep_every", "keep_best"):
        if getattr(ckpt, name) and ckpt.save is None:
            problems.append(f"checkpoint.{name} = {getattr(ckpt, name)}: has no effect without checkpoint.save.")
    return problems


def _dist_problems(cfg: ConfigContainer) -> list[str]:
    dist, problems = cfg.dist, []
    if watchdog_timeout_s(cfg) >= 60 * dist.distributed_timeout_minutes:
        problems.append(
            f"dist.watchdog_s = {dist.watchdog_s}: must be below dist.distributed_timeout_minutes = "
            f"{dist.distributed_timeout_minutes} ({60 * dist.distributed_timeout_minutes:g} s), or a collective gives up before "
            "the stacks are written."
        )
    if 0 < dist.straggler_factor <= 1:
        problems.append(f"dist.straggler_factor = {dist.straggler_factor}: must be above 1, or 0 (off).")
    code = dist.preempted_exit_code
    if code in TAKEN_EXIT_CODES or not 0 < code < 126:
        meaning = TAKEN_EXIT_CODES.get(code, "what shells use for signals")
        problems.append(f"dist.preempted_exit_code = {code}: stands for {meaning}. Use 3, or another number up to 125.")
    return problems
