"""What a run does in addition to training: the extension point, and the callbacks that a config asks for."""

from megatron_mtp.training.callbacks.base import Callback, Metrics, max_over_ranks, mean_over_ranks
from megatron_mtp.training.callbacks.gradient_norms import GradientNorms

__all__ = ["Callback", "GradientNorms", "Metrics", "max_over_ranks", "mean_over_ranks"]
