"""The class of the MTP block that Megatron-Core's GPTModel builds."""

from __future__ import annotations

from contextlib import AbstractContextManager

from megatron.core.models.gpt import gpt_model
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock

from megatron_mtp.mcore.patches import replaced


def mtp_block_class(block_class: type[MultiTokenPredictionBlock]) -> AbstractContextManager[None]:
    """Inside, a GPTModel builds its MTP block from `block_class`. Upstream a spec chooses the layers, not the block."""
    return replaced(gpt_model, MultiTokenPredictionBlock=block_class)
