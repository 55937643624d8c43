"""Which modules a chunk is made of: plain PyTorch's or Transformer Engine's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_gated_delta_net_module_spec
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mtp.model.mtp import MTPLayer
from megatron_mtp.model.torch_backend import (
    ExactGatedDeltaNet,
    ExactMLASelfAttention,
    PlainNorm,
    TorchSpecProvider,
    build_layer_spec,
)


def te_is_available() -> bool:
    """Whether Transformer Engine for PyTorch can be imported."""
    return importlib.util.find_spec("transformer_engine") is not None and _te_imports()


def _te_imports() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def block_spec(
    config: TransformerConfig, is_moe: list[bool], is_linear: list[bool], *, use_te: bool
) -> TransformerBlockSubmodules:
    """The decoder layers of one chunk.

    Args:
        is_moe: for each of them, whether it is a mixture of experts.
        is_linear: for each of them, whether its attention is linear.
    """
    kinds = zip(is_moe, is_linear, strict=True)
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(config, moe, is_linear=linear, use_te=use_te) for moe, linear in kinds],
        layer_norm=_provider(use_te).layer_norm(),
    )


def mtp_spec(
    config: TransformerConfig, num_layers: int, dense_width: int | None, layer_class: type[MTPLayer], *, use_te: bool
) -> MultiTokenPredictionBlockSubmodules:
    """All depths, made apart from the decoder's spec: a standalone MTP stage has no decoder layer to copy.

    Their attention is full, as in the released models with linear attention in the trunk.

    Args:
        dense_width: width of their dense feed-forward block; None: they have experts.
    """
    block = _layer_spec(config, dense_width is None, use_te=use_te)
    if dense_width is not None:
        block.submodules.mlp = partial(_build_mlp, block.submodules.mlp, dense_width)
    layer = get_mtp_layer_spec_for_backend(block, backend=_provider(use_te))
    layer.module = layer_class
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * num_layers)


def _build_mlp(build: Callable[..., nn.Module], width: int, *, config: TransformerConfig, **others: Any) -> nn.Module:
    """A dense feed-forward block of its own width: Megatron-Core's MLP takes that of its second product from the
    config, whatever it is given."""
    own = copy(config)
    own.ffn_hidden_size = width
    return build(config=own, ffn_hidden_size=width, **others)


def _layer_spec(config: TransformerConfig, is_moe: bool, *, is_linear: bool = False, use_te: bool) -> ModuleSpec:
    if not use_te:
        return build_layer_spec(config, is_moe, is_linear=is_linear)
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    if config.multi_latent_attention:
        # Under tensor parallelism without sequence parallelism the shared rope key loses gradient here too.
        spec.submodules.self_attention.module = ExactMLASelfAttention
    if is_linear:
        attention = get_gated_delta_net_module_spec(config, backend=_provider(use_te))
        attention.module, attention.submodules.out_norm = ExactGatedDeltaNet, PlainNorm
        spec.submodules.self_attention = attention
    return spec


def _provider(use_te: bool) -> TorchSpecProvider:
    if not use_te:
        return TorchSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
