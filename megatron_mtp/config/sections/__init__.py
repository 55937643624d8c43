"""The sections of a config, one file each, named after what it configures."""

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
from megatron_mtp.config.sections.run import RunConfig, section_types
from megatron_mtp.config.sections.scheduler import SchedulerConfig
from megatron_mtp.config.sections.tokenizer import TokenizerConfig
from megatron_mtp.config.sections.train import TrainConfig
from megatron_mtp.config.sections.validation import ValidationConfig

__all__ = [
    "CheckpointConfig",
    "DDPConfig",
    "DatasetConfig",
    "DistConfig",
    "LoggerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "ProfilingConfig",
    "RNGConfig",
    "RunConfig",
    "SchedulerConfig",
    "TokenizerConfig",
    "TrainConfig",
    "ValidationConfig",
    "section_types",
]
