"""Checks of a run beside its model and data: ranges, length, schedules, optimizer, precision, logs, checkpoints."""

from __future__ import annotations

from megatron_mtp.config.checks.model import range_problems
from megatron_mtp.config.container import ConfigContainer

POSITIVE = {
    "precision": ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
    "train": (
        "micro_batch_size",
        "global_batch_size",
        "train_iters",
        "train_samples",
        "train_tokens",
        "exit_interval",
        "exit_duration_in_mins",
        "manual_gc_interval",
        "spike_sigmas",
        "spike_window",
        "skip_limit",
        "check_replicas_interval",
    ),
    "validation": ("eval_interval", "eval_micro_batch_size", "eval_global_batch_size"),
    "optimizer": ("lr", "adam_eps", "muon_num_ns_steps"),
    "scheduler": (
        "lr_decay_iters",
        "lr_decay_samples",
        "lr_decay_tokens",
        "lr_wsd_decay_iters",
        "lr_wsd_decay_samples",
        "lr_wsd_decay_tokens",
    ),
    "ddp": ("bucket_size",),
    "dataset": ("seq_length",),
    "tokenizer": ("vocab_size",),
    "logger": ("log_interval", "tensorboard_log_interval", "device_peak_tflops"),
    "checkpoint": ("save_interval", "save_interval_mins", "keep_every"),
    "dist": ("distributed_timeout_minutes", "num_threads", "preemption_grace_s"),
}
NOT_NEGATIVE = {
    "train": ("rollback_limit",),
    "checkpoint": ("keep_best",),
    "dist": ("watchdog_s", "straggler_factor"),
    "validation": ("eval_iters",),
    "optimizer": ("min_lr", "weight_decay", "sgd_momentum", "muon_momentum", "clip_grad"),
    "scheduler": (
        "lr_warmup_iters",
        "lr_warmup_samples",
        "lr_warmup_tokens",
        "lr_warmup_fraction",
        "lr_warmup_init",
        "start_weight_decay",
        "end_weight_decay",
    ),
    "dataset": ("prefetch_steps",),
    "rng": ("seed",),
}
UNITS = ("iters", "samples", "tokens")


def run_range_problems(cfg: ConfigContainer) -> dict[str, str]:
    """Numbers outside their range, over all sections but the model; see `range_problems`."""
    problems = {}
    for name in {**POSITIVE, **NOT_NEGATIVE}:
        problems |= range_problems(getattr(cfg, name), POSITIVE.get(name, ()), NOT_NEGATIVE.get(name, ()))
    return problems


def length_problems(cfg: ConfigContainer) -> list[str]:
    """How long the run is, and its batch ramp."""
    train = cfg.train
    lengths = {f"train_{unit}": getattr(train, f"train_{unit}") for unit in UNITS}
    given = {name: value for name, value in lengths.items() if value is not None}
    problems = []
    if len(given) > 1 or (not given and train.exit_duration_in_mins is None):
        listed = ", ".join(f"train.{name} = {value}" for name, value in given.items()) or "none is set"
        problems.append(
            f"train.train_iters, train.train_samples, train.train_tokens: set exactly one ({listed}). "
            "Set the others to null. Only train.exit_duration_in_mins can stand in for all of them."
        )
    if train.rampup_batch_size is not None:
        problems += _ramp_problems(train.rampup_batch_size, train.global_batch_size)
    return problems


def _ramp_problems(ramp: list[int], final: int) -> list[str]:
    name = f"train.rampup_batch_size = {ramp}"
    if len(ramp) != 3:
        return [f"{name}: must be [start, increment, samples]."]
    start, increment, samples = ramp
    if start < 1 or increment < 1 or samples < 1:
        return [f"{name}: start, increment and samples must be above 0."]
    if start > final:
        return [f"{name}: starts above train.global_batch_size = {final}."]
    if (final - start) % increment:
        return [
            f"{name}: steps of {increment} from {start} do not reach train.global_batch_size = {final} exactly. "
            f"Choose an increment that divides {final - start}."
        ]
    return []


def scheduler_problems(cfg: ConfigContainer) -> list[str]:
    """Learning rate and weight decay over time."""
    sched, problems = cfg.scheduler, []
    used = {unit for unit in UNITS for kind in ("decay", "warmup", "wsd_decay") if getattr(sched, f"lr_{kind}_{unit}")}
    if len(used) > 1:
        problems.append(
            f"scheduler: lengths are given in {' and '.join(sorted(used))} at once. Give decay, warmup and WSD lengths in one "
            "unit; set the others to null (warmup: 0)."
        )
    if sched.lr_warmup_fraction is not None:
        if sched.lr_warmup_fraction >= 1:
            problems.append(f"scheduler.lr_warmup_fraction = {sched.lr_warmup_fraction}: must be below 1.")
        if any(getattr(sched, f"lr_warmup_{unit}") for unit in UNITS):
            problems.append("scheduler.lr_warmup_fraction: a warmup length is given too. Set one of them to null or 0.")
    problems += _order_problems(cfg) if len(used) <= 1 else []
    if cfg.train.exit_duration_in_mins is not None:
        problems += _length_of_decay_problems(cfg)
    problems += _wsd_problems(cfg)
    problems += _weight_decay_problems(cfg)
    if sched.lr_warmup_init > cfg.optimizer.lr:
        problems.append(
            f"scheduler.lr_warmup_init = {sched.lr_warmup_init}: must not be above optimizer.lr = {cfg.optimizer.lr}."
        )
    return problems


def _length_of_decay_problems(cfg: ConfigContainer) -> list[str]:
    sched = cfg.scheduler
    lengths = [getattr(cfg.train, f"train_{unit}") for unit in UNITS] + [
        getattr(sched, f"lr_decay_{unit}") for unit in UNITS
    ]
    if any(lengths) or (sched.lr_decay_style == "constant" and sched.lr_warmup_fraction is None):
        return []
    return [
        f"scheduler.lr_decay_style = {sched.lr_decay_style!r}: a decay needs a length, and a run that ends by wall-clock time "
        "has none. Set scheduler.lr_decay_iters (or _samples, _tokens), or use 'constant'."
    ]


def _order_problems(cfg: ConfigContainer) -> list[str]:
    """Warmup, then decay: an explicit decay must be longer. A decay over the whole run may be shorter than its warmup:
    a trial of ten steps of a long recipe is no mistake, and `hints` says that it never reaches the peak."""
    sched = cfg.scheduler
    for unit in UNITS:
        warmup, decay = getattr(sched, f"lr_warmup_{unit}"), getattr(sched, f"lr_decay_{unit}")
        if decay is not None and warmup >= decay:
            return [
                f"scheduler.lr_warmup_{unit} = {warmup}: must be below scheduler.lr_decay_{unit} = {decay}, which includes "
                "the warmup."
            ]
        wsd = getattr(sched, f"lr_wsd_decay_{unit}")
        if decay is not None and wsd is not None and warmup + wsd > decay:
            return [
                f"scheduler.lr_wsd_decay_{unit} = {wsd} and scheduler.lr_warmup_{unit} = {warmup}: together longer than "
                f"scheduler.lr_decay_{unit} = {decay}."
            ]
    return []


def _wsd_problems(cfg: ConfigContainer) -> list[str]:
    sched = cfg.scheduler
    lengths = [f"lr_wsd_decay_{unit}" for unit in UNITS if getattr(sched, f"lr_wsd_decay_{unit}") is not None]
    if sched.lr_decay_style == "WSD" and not lengths:
        return [
            "scheduler.lr_decay_style = 'WSD': needs the length of its last phase, such as scheduler.lr_wsd_decay_iters."
        ]
    if sched.lr_decay_style != "WSD" and lengths:
        return [f"scheduler.{lengths[0]}: has no effect with scheduler.lr_decay_style = {sched.lr_decay_style!r}."]
    return []


def _weight_decay_problems(cfg: ConfigContainer) -> list[str]:
    sched = cfg.scheduler
    start, end = sched.start_weight_decay, sched.end_weight_decay
    if (start is None) != (end is None):
        return ["scheduler.start_weight_decay and scheduler.end_weight_decay: give both, or neither."]
    if sched.weight_decay_incr_style == "constant" and start != end:
        return [
            f"scheduler.start_weight_decay = {start}, end_weight_decay = {end}: they differ, but "
            "scheduler.weight_decay_incr_style = 'constant'. Use 'linear' or 'cosine'."
        ]
    if sched.weight_decay_incr_style != "constant" and start is None:
        return [
            f"scheduler.weight_decay_incr_style = {sched.weight_decay_incr_style!r}: needs start_weight_decay and "
            "end_weight_decay."
        ]
    return []


def optimizer_problems(cfg: ConfigContainer) -> list[str]:
    """Optimizer, gradient reduction, precision."""
    opt, ddp, precision, problems = cfg.optimizer, cfg.ddp, cfg.precision, []
    if opt.min_lr > opt.lr:
        problems.append(f"optimizer.min_lr = {opt.min_lr}: must not be above optimizer.lr = {opt.lr}.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(opt, name) < 1:
            problems.append(f"optimizer.{name} = {getattr(opt, name)}: must be from 0 to below 1.")
    if ddp.overlap_param_gather and not (ddp.use_distributed_optimizer and ddp.overlap_grad_reduce):
        problems.append(
            "ddp.overlap_param_gather = True: needs ddp.use_distributed_optimizer = True and ddp.overlap_grad_reduce = True."
        )
    if precision.loss_scale is not None and precision.dtype != "fp16":
        problems.append(
            f"precision.loss_scale = {precision.loss_scale}: only fp16 scales the loss; precision.dtype = "
            f"{precision.dtype!r}. Set it to null."
        )
    if precision.min_loss_scale > precision.initial_loss_scale:
        problems.append(
            f"precision.min_loss_scale = {precision.min_loss_scale}: must not be above precision.initial_loss_scale = "
            f"{precision.initial_loss_scale}."
        )
    return problems


def record_problems(cfg: ConfigContainer) -> list[str]:
    """Logs, checkpoints, profiling."""
    logger, ckpt, prof, problems = cfg.logger, cfg.checkpoint, cfg.profiling, []
    if logger.wandb_project is not None and not logger.wandb_exp_name:
        problems.append(
            f"logger.wandb_project = {logger.wandb_project!r}: needs logger.wandb_exp_name, the name of the run."
        )
    if ckpt.most_recent_k != -1 and ckpt.most_recent_k < 1:
        problems.append(f"checkpoint.most_recent_k = {ckpt.most_recent_k}: must be -1 (all) or at least 1.")
    if ckpt.exit_on_missing_checkpoint and ckpt.load is None:
        problems.append("checkpoint.exit_on_missing_checkpoint = True: needs checkpoint.load.")
    if not prof.use_pytorch_profiler:
        return problems
    if prof.profile_dir is None:
        problems.append("profiling.use_pytorch_profiler = True: needs profiling.profile_dir.")
    if not 0 <= prof.profile_step_start < prof.profile_step_end:
        problems.append(
            f"profiling.profile_step_start = {prof.profile_step_start}: must be from 0 to below profiling.profile_step_end = "
            f"{prof.profile_step_end}."
        )
    if any(rank < 0 for rank in prof.profile_ranks):
        problems.append(f"profiling.profile_ranks = {prof.profile_ranks}: ranks start at 0.")
    return problems


def refused_in_run(cfg: ConfigContainer) -> list[str]:
    """Features outside the model that are refused by name."""
    return [
        f"ddp.{name} = True: fully sharded data parallelism is not supported. Use ddp.use_distributed_optimizer = True, "
        "which shards the optimizer state."
        for name in ("use_megatron_fsdp", "use_torch_fsdp2")
        if getattr(cfg.ddp, name)
    ]
