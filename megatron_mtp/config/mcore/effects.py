"""Which fields of model.mcore may change what a model computes, and not only how."""

from __future__ import annotations

from typing import Any

from megatron_mtp.config.mcore_table import MCORE_FIELDS
from megatron_mtp.config.sections import ModelConfig

SAME_FUNCTION = frozenset(
    """apply_rope_fusion attention_backend attention_softmax_in_fp32 bias_activation_fusion gradient_accumulation_fusion
    masked_softmax_fusion memory_efficient_layer_norm persist_layer_norm""".split()
)
"""Fields that change how the model computes. Any other field is taken to change what it computes."""


def changed_function(model: ModelConfig) -> dict[str, Any]:
    """The fields of `model.mcore` that are not at their default and may change what the model computes."""
    return {
        name: value
        for name, value in model.mcore.items()
        if name not in SAME_FUNCTION and value != MCORE_FIELDS[name][1]
    }
