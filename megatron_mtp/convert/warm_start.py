"""MTP layers for a trunk that was trained without: from its last layer, or fresh."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_mtp.config import ConfigContainer
from megatron_mtp.convert.links import Link
from megatron_mtp.model.initial_weights import draw_box, std_of

MTPInit = Literal["last_layer", "fresh"]
"""last_layer: the transformer layer is a copy of the trunk's last one and the final norm one of the trunk's; the norms of both
inputs and the projection are as in a new model. fresh: everything is."""

_NORM_ENDINGS = ("norm.weight", "layer_norm_weight")


def new_value(link: Link, cfg: ConfigContainer, dtype: torch.dtype) -> Tensor:
    """The box of a tensor as a new model with this config and seed has it.

    Args:
        link: of an MTP layer.
        cfg: finalized.
        dtype: of the result.
    """
    model = cfg.model
    lead = len(link.size) - len(link.sources[0].shape)
    size = link.size[lead:]
    if len(size) < 2:
        is_scale = link.key.endswith(_NORM_ENDINGS) and not model.layernorm_zero_centered_gamma
        return torch.full(link.size, 1.0 if is_scale else 0.0, dtype=dtype)
    box = draw_box(link.key, link.whole, link.offset, size, lead, cfg.rng.seed)
    return (box * std_of(link.key, model.init_method_std, model.num_layers)).to(dtype).reshape(link.size)
