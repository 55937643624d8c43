"""Builds the model chunks of one rank."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.mcore.rules import torch_backend_problems
from megatron_mtp.errors import UnsupportedError
from megatron_mtp.model.initial_weights import fill_initial_weights
from megatron_mtp.model.mtp import MTPModel, find_variant
from megatron_mtp.model.specs import block_spec, mtp_spec, te_is_available
from megatron_mtp.model.transformer_config import transformer_config
from megatron_mtp.parallel.params import mtp_dense_width, padded_vocab_size
from megatron_mtp.parallel.resolve import ResolvedRun


def build_model(run: ResolvedRun, groups: ProcessGroupCollection, device: torch.device) -> list[MTPModel]:
    """The chunks of this rank with their initial weights, on `device`, in fp32; see `training/setup.py` for wrapping.

    Args:
        run: the resolved run.
        groups: every process group of the layout.
        device: "meta" builds shapes only.

    Returns:
        One chunk, or one for each virtual stage.
    """
    cfg = run.cfg
    use_te = wants_te(cfg, device.type)
    if not use_te and (problems := torch_backend_problems(cfg.model)):
        raise UnsupportedError(problems)
    config = transformer_config(run, use_te=use_te, device_type=device.type)
    chunks = [_build_chunk(run, config, groups, vp_stage, use_te=use_te) for vp_stage in range(run.layout.vp)]
    for chunk in chunks:
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        if cfg.model.mtp_freeze_trunk:
            _freeze_trunk(chunk)
    if device.type != "meta":
        fill_initial_weights(
            list(chunks), seed=cfg.rng.seed, std=cfg.model.init_method_std, num_layers=cfg.model.num_layers
        )
    return chunks


def wants_te(cfg: ConfigContainer, device_type: str) -> bool:
    """Whether Transformer Engine modules do the work. Its attention cannot read documents as they are given here."""
    choice = cfg.model.backend
    if choice == "auto" and cfg.dataset.reset_attention_mask:
        choice = "torch"
    if choice == "transformer_engine" and not (te_is_available() and device_type == "cuda"):
        raise UnsupportedError(
            "model.backend = transformer_engine: needs Transformer Engine and a CUDA device; this process has "
            f"{'no Transformer Engine' if not te_is_available() else f'device {device_type}'}. "
            "Use model.backend=torch, or auto."
        )
    return choice == "transformer_engine" or (choice == "auto" and device_type == "cuda" and te_is_available())


def _build_chunk(
    run: ResolvedRun,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    vp_stage: int,
    *,
    use_te: bool,
) -> MTPModel:
    model, layout, pp_rank = run.cfg.model, run.layout, groups.pp.rank()
    layers = layout.decoder_layers(pp_rank, vp_stage)
    symbols = layout.chunks[pp_rank][vp_stage]
    variant, mtp = find_variant(model.mtp_variant), None
    if "m" in symbols:
        mtp = mtp_spec(config, run.depths.distinct, mtp_dense_width(model), variant.layer, use_te=use_te)
    return MTPModel(
        config=config,
        transformer_layer_spec=block_spec(
            config, [run.is_moe[idx] for idx in layers], [run.is_linear[idx] for idx in layers], use_te=use_te
        ),
        vocab_size=padded_vocab_size(model),
        max_sequence_length=model.seq_length,
        pre_process="E" in symbols,
        post_process="L" in symbols,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        mtp_block_spec=mtp,
        pg_collection=groups,
        vp_stage=vp_stage if layout.vp > 1 else None,
        hidden_source=model.mtp_hidden_source,
        variant=variant,
    )


def _freeze_trunk(chunk: nn.Module) -> None:
    """Turns gradients off outside the MTP layers, and the update of expert biases, which have no gradient."""
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad = name.startswith("mtp.")
    for name, module in chunk.named_modules():
        if isinstance(module, TopKRouter) and not name.startswith("mtp."):
            module.frozen_expert_bias = True
