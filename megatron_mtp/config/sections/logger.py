"""Where metrics are written, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import MAX_STEPS, Resume, knob


@dataclass(kw_only=True, slots=True)
class LoggerConfig(Section):
    """Where metrics are written, and how often."""

    SECTION: ClassVar[str] = "logger"
    RESUME: ClassVar[Resume] = "free"

    log_interval: int = knob(10, ge=1, le=MAX_STEPS)
    """Steps between console lines."""
    log_dir: str | None = knob(None, is_path=True, is_written=True)
    """Folder of metrics.jsonl; None: CHECKPOINT_SAVE.metrics.jsonl, next to checkpoint.save, if that is set."""
    tensorboard_dir: str | None = knob(None, is_path=True, is_written=True)
    """Folder of TensorBoard events; None: off."""
    tensorboard_log_interval: int = knob(1, ge=1, le=MAX_STEPS)
    """Steps between TensorBoard, W&B and JSONL records."""
    health_interval: int | None = knob(10, ge=1, le=MAX_STEPS)
    """Steps between measurements of MTP's share of the gradient and of the loads of experts; None: never."""
    wandb_project: str | None = None
    """Weights & Biases project; None: off."""
    wandb_exp_name: str | None = None
    """Name of the run in W&B; None: the last part of `checkpoint.save`, and required where that is not set."""
    wandb_entity: str | None = None
    """W&B team or user."""
    wandb_group: str | None = None
    """Group of the run in W&B, for runs that belong together."""
    wandb_tags: list[str] = knob([])
    """Tags of the run in W&B."""
    wandb_notes: str | None = None
    """Notes on the run in W&B: what it is for."""
    wandb_save_dir: str | None = knob(None, is_path=True, is_written=True)
    """Folder of the local W&B files; None: W&B's default."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline writes to wandb_save_dir only."""
    progress_bar: bool | None = None
    """Show a progress bar; None: only in a terminal."""
    log_throughput: bool = True
    """Tokens/s, TFLOP/s and MFU on each console line."""
    device_peak_tflops: float | None = knob(None, gt=0, le=1e9)
    """Dense peak of the device in the training dtype, for MFU; None: from the table of known devices."""
