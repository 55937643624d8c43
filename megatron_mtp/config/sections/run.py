"""All sections of a run in one object, without the operations on it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar

from megatron_mtp.config.base import Section
from megatron_mtp.config.knob import knob
from megatron_mtp.config.sections.checkpoint import CheckpointConfig
from megatron_mtp.config.sections.dataset import DatasetConfig
from megatron_mtp.config.sections.ddp import DDPConfig
from megatron_mtp.config.sections.dist import DistConfig
from megatron_mtp.config.sections.logger import LoggerConfig
from megatron_mtp.config.sections.model import ModelConfig
from megatron_mtp.config.sections.optimizer import OptimizerConfig
from megatron_mtp.config.sections.precision import PrecisionConfig
from megatron_mtp.config.sections.profiling import ProfilingConfig
from megatron_mtp.config.sections.rng import RNGConfig
from megatron_mtp.config.sections.scheduler import SchedulerConfig
from megatron_mtp.config.sections.tokenizer import TokenizerConfig
from megatron_mtp.config.sections.train import TrainConfig
from megatron_mtp.config.sections.validation import ValidationConfig


@dataclass(kw_only=True, slots=True)
class RunConfig(Section):
    """The data of `ConfigContainer`; checks, derived values and serialization are functions of it."""

    SECTION: ClassVar[str] = "config"

    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    ddp: DDPConfig = field(default_factory=DDPConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    dist: DistConfig = field(default_factory=DistConfig)
    rng: RNGConfig = field(default_factory=RNGConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    phases: dict[str, dict[str, Any]] = knob({})
    """Name of a phase -> where it begins (`start_iters`, `start_samples` or `start_tokens`) and the fields that it
    sets, section by section; in the order in which they begin (docs/phases.md)."""


@cache
def section_types() -> dict[str, type[Section]]:
    """The class of each section, by its name."""
    found: dict[str, Any] = {one.name: one.default_factory for one in fields(RunConfig)}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Section)}
