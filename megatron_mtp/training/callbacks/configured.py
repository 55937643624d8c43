"""The callbacks that a config asks for. `pretrain` makes them, from Python and from the command line alike."""

from __future__ import annotations

from megatron_mtp.config import ConfigContainer
from megatron_mtp.training.callbacks.base import Callback, ConfiguredCallback
from megatron_mtp.training.callbacks.draft_evaluation import DraftEvaluation
from megatron_mtp.training.callbacks.garbage_collection import GarbageCollection
from megatron_mtp.training.callbacks.named import named_callbacks
from megatron_mtp.training.callbacks.profiler import Profiler
from megatron_mtp.training.callbacks.replicas import ReplicaCheck
from megatron_mtp.training.callbacks.stragglers import StragglerReport

BUILT_IN: tuple[type[ConfiguredCallback], ...] = (
    GarbageCollection,
    Profiler,
    ReplicaCheck,
    StragglerReport,
    DraftEvaluation,
)


def configured_callbacks(cfg: ConfigContainer) -> list[Callback]:
    """The built-in callbacks that `cfg` switches on, then those that it names, in the order in which they are called.

    Raises:
        ConfigError: a callback that is asked for cannot be made, or cannot run with this config.
    """
    built_in = [callback for kind in BUILT_IN if (callback := kind.from_config(cfg)) is not None]
    return [*built_in, *named_callbacks(cfg.train.callbacks)]
