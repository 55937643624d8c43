"""Pairs of features that are refused by name before a launch. docs/numerics.md lists them, from tests/numerics/pairs.py."""

from __future__ import annotations

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.layout_text import layout_chunks
from megatron_mtp.config.sections import ModelConfig


def refused_pairs(cfg: ConfigContainer) -> list[str]:
    """Each problem is a complete message: field and value, rule, other value, what to do."""
    return (
        _hidden_source_problems(cfg.model)
        + _document_problems(cfg)
        + _packing_problems(cfg)
        + _recompute_problems(cfg.model)
        + _sink_problems(cfg.model)
    )


def _hidden_source_problems(model: ModelConfig) -> list[str]:
    """Depth 1 reads the input of the final norm, which exists only where the last decoder layer is."""
    if model.mtp_hidden_source != "pre_final_norm" or not model.mtp_num_layers:
        return []
    pp, vp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    if vp > 1 and pp == 1:
        return []  # reported as a mistake
    if model.pipeline_model_parallel_layout == "auto" and model.num_layers >= pp * vp - 1:
        return []  # the planner keeps them together
    chunks, problems = layout_chunks(
        model.pipeline_model_parallel_layout, num_layers=model.num_layers, num_depths=model.mtp_num_layers, pp=pp, vp=vp
    )
    if problems:
        return []
    if any("m" in chunk and "t" in chunk for chunk in chunks):
        return []
    return [
        "model.mtp_hidden_source = 'pre_final_norm': depth 1 reads the input of the final norm, which stays on the stage of the "
        f"last decoder layer; in model.pipeline_model_parallel_layout = {'|'.join(chunks)} the MTP layers (m) share no chunk "
        "with a decoder layer (t). Give their chunk the last decoder layer, for example with a list whose last entry is 1 or "
        "more, or use 'post_final_norm'."
    ]


def _document_problems(cfg: ConfigContainer) -> list[str]:
    if cfg.model.backend != "transformer_engine" or not cfg.dataset.reset_attention_mask:
        return []
    return [
        "dataset.reset_attention_mask = True: documents reach the attention as one id for each token, which Transformer Engine's "
        "attention would misread as a mask; model.backend = 'transformer_engine'. Use model.backend = 'torch' (or 'auto', "
        "which then takes it), at every parallel size; or leave documents joined and set dataset.eod_mask_loss = True."
    ]


def _packing_problems(cfg: ConfigContainer) -> list[str]:
    """The state of a linear attention runs on from one document into the next; only flash-linear-attention's kernels stop it."""
    if cfg.model.experimental_attention_variant is None or not cfg.dataset.reset_attention_mask:
        return []
    return [
        f"dataset.reset_attention_mask = True: model.experimental_attention_variant = "
        f"{cfg.model.experimental_attention_variant!r} carries a state along the whole sequence and does not stop it at documents. "
        "Leave documents joined and set dataset.eod_mask_loss = True, or use a model with attention in all layers."
    ]


def _recompute_problems(model: ModelConfig) -> list[str]:
    """Megatron-Core asserts this inside its MTP layer where FP8 keeps its own recomputation."""
    uses_fp8 = bool(model.mcore.get("fp8") or model.mcore.get("fp4"))
    if not (uses_fp8 and model.mtp_num_layers and model.recompute_granularity == "full"):
        return []
    if model.recompute_method == "uniform" and model.recompute_num_layers == 1:
        return []
    return [
        f"model.recompute_method = {model.recompute_method!r}, model.recompute_num_layers = {model.recompute_num_layers}: in FP8 "
        f"or FP4 the MTP layers (model.mtp_num_layers = {model.mtp_num_layers}) are recomputed by 'uniform' with 1 layer only. "
        "Use these, or no recomputation."
    ]


def _sink_problems(model: ModelConfig) -> list[str]:
    """Megatron-Core 0.19.2 does not mark the sinks as sharded, so the gradient norm holds one rank's heads only."""
    tp = model.tensor_model_parallel_size
    if model.mcore.get("softmax_type") != "learnable" or tp == 1:
        return []
    return [
        "model.mcore.softmax_type = 'learnable': the gradient norm would leave out the attention sinks of all but one rank; "
        f"model.tensor_model_parallel_size = {tp}. Set it to 1, or remove softmax_type."
    ]
