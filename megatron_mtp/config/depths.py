"""MTP depths: how many a model predicts, and how many MTP layers exist for them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mtp.config.sections import ModelConfig

MTP_BLOCK = "transformer_layer."
"""Name of an MTP layer's transformer layer in Megatron-Core's checkpoints, whatever its module is called."""


def distinct_layers(num_depths: int, is_repeated: bool) -> int:
    """MTP layers that exist: one for each depth, or one for all depths if it is repeated (`mtp_use_repeated_layer`)."""
    return min(num_depths, 1) if is_repeated else num_depths


def loss_names(num_depths: int) -> list[str]:
    """Names of the losses of depths 0..D as the ecosystem writes them."""
    return ["lm loss", *(f"mtp_{depth} loss" for depth in range(1, num_depths + 1))]


@dataclass(frozen=True, slots=True)
class Depths:
    """The MTP depths of a model; depth 0, the main prediction, is not counted.

    Args:
        count: depths, each with a loss of its own.
        distinct: MTP layers with weights of their own; a repeated layer counts once.
        weights: weight of each depth in the mean over depths, [count].
    """

    count: int
    distinct: int
    weights: tuple[float, ...]

    @classmethod
    def of(cls, model: ModelConfig) -> Depths:
        """The depths of a finalized model config."""
        count = model.mtp_num_layers
        weights = tuple(model.mtp_depth_weights or [1.0] * count)
        return cls(count, distinct_layers(count, model.mtp_use_repeated_layer), weights)

    def layers_in(self, symbols: str) -> int:
        """MTP layers that a chunk such as "ttmmL" holds: one chunk holds all of them."""
        return self.distinct if "m" in symbols else 0
