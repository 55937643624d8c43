"""New MTP layers for a trunk that was trained without them: copied from its last layer, or random."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_mtp.config import ConfigContainer
from megatron_mtp.convert.links import TensorLink
from megatron_mtp.model.initial_weights import draw_box, std_of

MTPInit = Literal["last_layer", "fresh"]
"""last_layer: transformer layer and final norm are copies of the trunk's last ones; input norms and projection are
initialised as in a new model. fresh: everything is initialised as in a new model."""

_NORM_ENDINGS = ("norm.weight", "layer_norm_weight")


def new_value(link: TensorLink, cfg: ConfigContainer, dtype: torch.dtype) -> Tensor:
    """The box of a tensor as initialised in a new model with this config and seed.

    Args:
        link: a tensor of an MTP layer.
        cfg: finalized.
        dtype: dtype of the result.
    """
    model = cfg.model
    lead = len(link.size) - len(link.theirs[0].shape)
    size = link.size[lead:]
    if len(size) < 2:
        is_scale = link.key.endswith(_NORM_ENDINGS) and not model.layernorm_zero_centered_gamma
        return torch.full(link.size, 1.0 if is_scale else 0.0, dtype=dtype)
    box = draw_box(link.key, link.shape, link.offset, size, lead, cfg.rng.seed)
    return (box * std_of(link.key, model.init_method_std, model.num_layers)).to(dtype).reshape(link.size)
