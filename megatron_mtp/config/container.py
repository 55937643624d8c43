"""The config of a run: all sections in one object."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from megatron_mtp.config.base import Section
from megatron_mtp.config.sections import (
    CheckpointConfig,
    DatasetConfig,
    DDPConfig,
    DistConfig,
    LoggerConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    ProfilingConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainConfig,
    ValidationConfig,
)


@dataclass(kw_only=True, slots=True)
class ConfigContainer(Section):
    """Everything a run needs. A recipe returns one; change fields, then `finalize()` derives, checks and freezes."""

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

    def finalize(self, world_size: int | None = None) -> Self:
        """Derives, checks across fields and freezes; see `megatron_mtp.config.finalize.finalize`."""
        from megatron_mtp.config.finalize import finalize

        finalize(self, world_size)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        from megatron_mtp.config.serialize import to_dict

        return to_dict(self)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """YAML text, also written to `path` if it is given."""
        from megatron_mtp.config.serialize import to_yaml

        return to_yaml(self, path)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ConfigContainer:
        """A config from plain data; unknown names and misfits raise ConfigError."""
        from megatron_mtp.config.serialize import from_dict

        return from_dict(data)

    @staticmethod
    def from_yaml(text_or_path: str | Path) -> ConfigContainer:
        """A config from YAML text or a YAML file; unknown names and misfits raise ConfigError."""
        from megatron_mtp.config.serialize import from_yaml

        return from_yaml(text_or_path)
