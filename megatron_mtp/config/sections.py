"""Every section of a config but the model: training, optimizer, data, logs, checkpoints, devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megatron_mtp.config.base import Section

Hardware = Literal["h100", "h200", "h800", "h20", "b200", "gb200", "a100", "l40s", "mi300x", "cpu"]
"""Devices of parallel/planner/machines.py."""


@dataclass(kw_only=True, slots=True)
class PrecisionConfig(Section):
    """Dtype of the weights and activations in the forward and backward pass. Master weights are fp32."""

    SECTION: ClassVar[str] = "precision"

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """fp16 scales the loss."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    loss_scale: float | None = None
    """Constant loss scale for fp16; None: dynamic."""
    initial_loss_scale: float = 2.0**16
    """Where the dynamic loss scale starts."""
    min_loss_scale: float = 1.0
    """The dynamic loss scale stops halving here; training ends if steps go on overflowing."""
    loss_scale_window: int = 1000
    """Good steps before the scale doubles."""
    hysteresis: int = 2
    """Overflows before the scale halves."""


@dataclass(kw_only=True, slots=True)
class TrainConfig(Section):
    """Batch sizes, the end of training, and what to do about bad numbers."""

    SECTION: ClassVar[str] = "train"

    micro_batch_size: int = 1
    """Samples in one forward pass of one rank."""
    global_batch_size: int = 1
    """Samples in one optimizer step over all ranks."""
    rampup_batch_size: list[int] | None = None
    """[start, increment, samples]: grows the global batch from start to global_batch_size over that many samples."""
    train_iters: int | None = None
    """Ends after this many steps."""
    train_samples: int | None = None
    """Ends after this many samples."""
    train_tokens: int | str | None = None
    """Ends after this many tokens; "10B" is accepted."""
    exit_interval: int | None = None
    """Saves and leaves after a step divisible by this."""
    exit_duration_in_mins: float | None = None
    """Saves and leaves after this much wall-clock time."""
    manual_gc: bool = True
    """Python's garbage collector runs at the same steps on every rank."""
    manual_gc_interval: int = 100
    """Steps between collections."""
    deterministic: bool = False
    """Ask torch for deterministic kernels; slower on a GPU."""
    on_nan: Literal["skip", "stop", "rollback"] = "skip"
    """A loss or gradient that is not finite: leave the update out, stop, or go back to the last checkpoint and pass over the batches since."""
    on_spike: Literal["report", "skip", "stop", "rollback"] = "report"
    """A loss or gradient norm far above those before it: apply it and say so, or as on_nan."""
    spike_sigmas: float = 6.0
    """A spike is this many standard deviations above the mean of the last spike_window good steps."""
    spike_window: int = 128
    """Good steps that a spike is compared with; half of them must have been done."""
    skip_limit: int = 10
    """Steps left out in a row after which the run stops."""
    rollback_limit: int = 3
    """Rollbacks after which the run stops at the next fault."""
    check_replicas_interval: int | None = None
    """Steps between comparisons of the weights of data-parallel replicas, by hash; None: never."""


@dataclass(kw_only=True, slots=True)
class ValidationConfig(Section):
    """Evaluation on held-out samples, the loss of every depth included."""

    SECTION: ClassVar[str] = "validation"

    eval_interval: int | None = None
    """Steps between evaluations; None: none during training."""
    eval_iters: int = 32
    """Global batches of one evaluation; 0: no evaluation."""
    eval_at_start: bool = False
    """Evaluate before the first step."""
    eval_at_end: bool = True
    """Evaluate after the last step."""
    eval_micro_batch_size: int | None = None
    """None: train.micro_batch_size."""
    eval_global_batch_size: int | None = None
    """None: train.global_batch_size."""
    draft_prompts: int = 0
    """At each evaluation, beginnings of this many held-out samples are decoded with the MTP layers as drafters (drafting/...); 0: none."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig(Section):
    """The update rule."""

    SECTION: ClassVar[str] = "optimizer"

    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    """adam is AdamW (decoupled weight decay)."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the decay."""
    weight_decay: float = 0.1
    """Applied to matrices; not to biases and norms."""
    apply_wd_to_qk_layernorm: bool = False
    """Weight decay on query and key norms too."""
    adam_beta1: float = 0.9
    """First moment."""
    adam_beta2: float = 0.95
    """Second moment."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""
    sgd_momentum: float = 0.9
    """Momentum of SGD."""
    muon_momentum: float = 0.95
    """Momentum of Muon."""
    muon_num_ns_steps: int = 5
    """Newton-Schulz steps of Muon."""
    muon_scale_mode: str = "spectral"
    """Scale of Muon's update."""
    clip_grad: float = 1.0
    """Global gradient norm is clipped to this; 0: no clipping."""
    log_num_zeros_in_grad: bool = False
    """Count zeros in the gradients."""


@dataclass(kw_only=True, slots=True)
class SchedulerConfig(Section):
    """Learning rate and weight decay over time. Give lengths in iterations, or in samples, or in tokens, not mixed."""

    SECTION: ClassVar[str] = "scheduler"

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay."""
    lr_decay_iters: int | None = None
    """Steps of the decay, warmup included; None: the whole run."""
    lr_decay_samples: int | None = None
    """The same in samples."""
    lr_decay_tokens: int | str | None = None
    """The same in tokens."""
    lr_warmup_iters: int = 0
    """Steps of linear warmup."""
    lr_warmup_samples: int = 0
    """The same in samples."""
    lr_warmup_tokens: int | str = 0
    """The same in tokens."""
    lr_warmup_fraction: float | None = None
    """Warmup as a share of the decay."""
    lr_warmup_init: float = 0.0
    """Learning rate at step 0."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "minus_sqrt"
    """Shape of WSD's last phase."""
    lr_wsd_decay_iters: int | None = None
    """Steps of WSD's last phase."""
    lr_wsd_decay_samples: int | None = None
    """The same in samples."""
    lr_wsd_decay_tokens: int | str | None = None
    """The same in tokens."""
    start_weight_decay: float | None = None
    """None: optimizer.weight_decay."""
    end_weight_decay: float | None = None
    """None: optimizer.weight_decay."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay moves from start to end."""


@dataclass(kw_only=True, slots=True)
class DDPConfig(Section):
    """Data parallelism and the sharding of the optimizer."""

    SECTION: ClassVar[str] = "ddp"

    use_distributed_optimizer: bool = True
    """Shards optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass runs; needs the distributed optimizer."""
    bucket_size: int | None = None
    """Parameters in one communication bucket; None: Megatron's rule."""
    check_for_nan_in_grad: bool = False
    """Stop at a NaN in a local gradient before it is reduced."""
    use_megatron_fsdp: bool = False
    """Not supported; refused by name."""
    use_torch_fsdp2: bool = False
    """Not supported; refused by name."""


@dataclass(kw_only=True, slots=True)
class DatasetConfig(Section):
    """Megatron `.bin/.idx` datasets and how samples are cut from them."""

    SECTION: ClassVar[str] = "dataset"

    blend: list | None = None
    """[[prefix, ...], [weight, ...] or None], or a flat list of prefixes; None (and no blend_per_split): mock data."""
    blend_per_split: list | None = None
    """One blend for each of train, validation, test (None where a split is absent)."""
    split: str | None = "9999,8,2"
    """Shares of train, validation and test within each prefix of `blend`."""
    seq_length: int | None = None
    """None: model.seq_length."""
    path_to_cache: str | None = None
    """Where indices are kept; None: beside each prefix."""
    valid_sets: dict[str, list] | None = None
    """Further validation sets: name -> blend. Each is reported under its name."""
    eod_mask_loss: bool = False
    """Targets after an end-of-document token carry no loss."""
    loss_mask_suffix: str | None = None
    """Beside each prefix lies <prefix><suffix>.bin/.idx, one number for each token: 0 if it is no target (a prompt); None: all are."""
    reset_attention_mask: bool = False
    """Attention stays within a document, and no depth predicts across its end."""
    reset_position_ids: bool = False
    """Positions start again at each document."""
    mock: bool = False
    """Random tokens that repeat with a pattern, made from rng.seed; no files needed."""
    prefetch_steps: int = 2
    """Global batches read ahead by a background thread; 0: none."""
    check_token_ids: bool = True
    """Compare the ids of each batch with the vocabulary."""


@dataclass(kw_only=True, slots=True)
class TokenizerConfig(Section):
    """The tokenizer that made the data."""

    SECTION: ClassVar[str] = "tokenizer"

    tokenizer_type: Literal["huggingface", "sentencepiece", "tiktoken", "bytes", "null"] = "null"
    """bytes: 256 bytes and an end-of-document id; null: integers only, vocab_size needed."""
    tokenizer_model: str | None = None
    """tokenizer.json or a folder with one (huggingface), *.model (sentencepiece), *.tiktoken or a JSON (tiktoken)."""
    vocab_size: int | None = None
    """For null: the number of ids; its last id ends a document."""


@dataclass(kw_only=True, slots=True)
class LoggerConfig(Section):
    """Where figures go and how often."""

    SECTION: ClassVar[str] = "logger"

    log_interval: int = 10
    """Steps between console lines."""
    log_dir: str | None = None
    """Folder of metrics.jsonl; None: the file is CHECKPOINT_SAVE.metrics.jsonl beside checkpoint.save, if that is set."""
    tensorboard_dir: str | None = None
    """TensorBoard events; None: off."""
    tensorboard_log_interval: int = 1
    """Steps between TensorBoard, W&B and JSONL records."""
    wandb_project: str | None = None
    """Weights & Biases project; None: off."""
    wandb_exp_name: str | None = None
    """Name of the run; needed with wandb_project."""
    wandb_entity: str | None = None
    """Team or user."""
    wandb_save_dir: str | None = None
    """Folder of the local W&B files."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline writes to wandb_save_dir only."""
    progress_bar: bool | None = None
    """None: only in a terminal."""
    log_params_norm: bool = False
    """Norm of all weights on each console line."""
    log_throughput: bool = True
    """Tokens/s, TFLOP/s and MFU on each console line."""
    device_peak_tflops: float | None = None
    """Dense peak of the device in the training dtype; None: from the table of known devices."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig(Section):
    """Saving and loading."""

    SECTION: ClassVar[str] = "checkpoint"

    save: str | None = None
    """Folder of this run's checkpoints; None: nothing is saved."""
    load: str | None = None
    """Folder to resume from; the newest whole checkpoint in it. An empty or absent folder is a fresh start when it equals `save`."""
    pretrained_checkpoint: str | None = None
    """Weights to start from where there is nothing to resume: run directory or checkpoint folder, such as `convert import` makes. Optimizer and counters start anew."""
    save_interval: int | None = None
    """Steps between checkpoints; None: only at the end."""
    save_optim: bool = True
    """Save optimizer state."""
    load_optim: bool = True
    """Load optimizer state."""
    save_interval_mins: float | None = None
    """Minutes between checkpoints, beside save_interval; None: none by the clock."""
    most_recent_k: int = -1
    """Keep this many; -1: all."""
    keep_every: int | None = None
    """Checkpoints of iterations divisible by this are kept for ever, beside the most recent ones."""
    keep_best: int = 0
    """Save after an evaluation with the lowest loss so far, and keep this many with the lowest ones, beside the most recent ones."""
    async_save: bool = False
    """Write while training goes on."""
    exit_on_missing_checkpoint: bool = False
    """Stop if `load` holds no checkpoint."""


@dataclass(kw_only=True, slots=True)
class DistConfig(Section):
    """Processes and devices."""

    SECTION: ClassVar[str] = "dist"

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where a GPU is present."""
    hardware: Hardware | None = None
    """Device that the planner estimates times and memory for, where model.pipeline_model_parallel_layout is "auto" and in `megatron-mtp plan`; None: cpu with device=cpu, else h100."""
    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer ends the job."""
    watchdog_s: float | None = None
    """A rank without progress for this long ends the job, with the stack of every rank; None: nine tenths of distributed_timeout_minutes; 0: off."""
    node_check: bool = True
    """Before the first step: versions equal, checkpoint folder shared, bandwidth between ranks."""
    straggler_factor: float = 1.5
    """Ranks whose own work takes this many times the median are named in the log; 0: off."""
    preempted_exit_code: int = 3
    """Exit code after SIGTERM and its checkpoint; launchers start such a job again."""
    preemption_grace_s: int = 300
    """Seconds that launchers leave between SIGTERM and SIGKILL; the scripts of `megatron-mtp launch` are made with it."""
    use_tp_pp_dp_mapping: bool = False
    """Rank order tp-cp-ep-pp-dp in place of tp-cp-ep-dp-pp."""
    num_threads: int | None = None
    """CPU threads of each rank; None: cores divided by local ranks on a CPU, torch's choice on a GPU."""


@dataclass(kw_only=True, slots=True)
class RNGConfig(Section):
    """Random numbers."""

    SECTION: ClassVar[str] = "rng"

    seed: int = 1234
    """Initial weights, data order and dropout follow from it."""


@dataclass(kw_only=True, slots=True)
class ProfilingConfig(Section):
    """torch.profiler over a range of steps."""

    SECTION: ClassVar[str] = "profiling"

    use_pytorch_profiler: bool = False
    """Write a trace for TensorBoard or Perfetto."""
    profile_step_start: int = 10
    """First step of the trace."""
    profile_step_end: int = 12
    """Step after the last of the trace."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write one."""
    profile_dir: str | None = None
    """Folder of the traces; needed with use_pytorch_profiler."""
