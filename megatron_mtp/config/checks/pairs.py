"""Pairs of features that are refused before a launch. docs/numerics.md lists them, from tests/numerics/pairs.py."""

from __future__ import annotations

from megatron_mtp.config.layout_text import layout_chunks
from megatron_mtp.config.problem import refusal
from megatron_mtp.config.sections import ModelConfig, RunConfig
from megatron_mtp.errors import Problem


def pair_refusals(cfg: RunConfig) -> list[Problem]:
    """Pairs of features that would be wrong together."""
    return (
        _hidden_source_problems(cfg.model)
        + _document_problems(cfg)
        + _packing_problems(cfg)
        + _recompute_problems(cfg.model)
        + _sink_problems(cfg.model)
    )


def _hidden_source_problems(model: ModelConfig) -> list[Problem]:
    """Depth 1 reads the input of the final norm, which exists only where the last decoder layer is."""
    if model.mtp_hidden_source != "pre_final_norm" or not model.mtp_num_layers:
        return []
    pp, vp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    if vp > 1 and pp == 1:
        return []  # reported as a mistake
    if model.pipeline_model_parallel_layout == "auto" and model.num_layers >= pp * vp - 1:
        return []  # the planner keeps them together
    chunks, problems = layout_chunks(
        model.pipeline_model_parallel_layout, num_layers=model.num_layers, num_depths=model.mtp_num_layers, pp=pp, vp=vp
    )
    if problems or any("m" in chunk and "t" in chunk for chunk in chunks):
        return []
    rule = (
        "depth 1 reads the input of the final norm, which stays on the stage of the last decoder layer; in "
        "{model.pipeline_model_parallel_layout} = {layout} the MTP layers (m) share no chunk with a decoder layer (t)"
    )
    remedy = (
        "Give their chunk the last decoder layer, for example with a list whose last entry is 1 or more, or use "
        "'post_final_norm'."
    )
    return [refusal(model, "model.mtp_hidden_source", rule, remedy, layout="|".join(chunks))]


def _document_problems(cfg: RunConfig) -> list[Problem]:
    if cfg.model.backend != "transformer_engine" or not cfg.dataset.reset_attention_mask:
        return []
    rule = (
        "documents reach the attention as one id for each token, which the attention of {model.backend=} would misread "
        "as a mask"
    )
    remedy = (
        "Use model.backend = 'torch' (or 'auto', which then chooses it), at every parallel size; or leave documents "
        "joined and set dataset.eod_mask_loss = True."
    )
    return [refusal(cfg, "dataset.reset_attention_mask", rule, remedy)]


def _packing_problems(cfg: RunConfig) -> list[Problem]:
    """Only the kernels of flash-linear-attention stop the state of a linear attention at the end of a document."""
    if cfg.model.experimental_attention_variant is None or not cfg.dataset.reset_attention_mask:
        return []
    rule = (
        "{model.experimental_attention_variant=} carries a state along the complete sequence and does not stop it at "
        "documents"
    )
    remedy = "Leave documents joined and set dataset.eod_mask_loss = True, or use a model with attention in all layers."
    return [refusal(cfg, "dataset.reset_attention_mask", rule, remedy)]


def _recompute_problems(model: ModelConfig) -> list[Problem]:
    """Megatron-Core asserts this inside its MTP layer where FP8 keeps its own recomputation."""
    uses_fp8 = bool(model.mcore.get("fp8") or model.mcore.get("fp4"))
    if not (uses_fp8 and model.mtp_num_layers and model.recompute_granularity == "full"):
        return []
    if model.recompute_method == "uniform" and model.recompute_num_layers == 1:
        return []
    rule = (
        "in FP8 or FP4 the MTP layers ({model.mtp_num_layers=}) are recomputed by 'uniform' with 1 layer only, not "
        "with {model.recompute_num_layers=}"
    )
    return [refusal(model, "model.recompute_method", rule, "Use these, or no recomputation.")]


def _sink_problems(model: ModelConfig) -> list[Problem]:
    """Megatron-Core 0.19.2 does not mark the sinks as sharded, so the gradient norm holds one rank's heads only."""
    if model.mcore.get("softmax_type") != "learnable" or model.tensor_model_parallel_size == 1:
        return []
    rule = (
        "the gradient norm would leave out the attention sinks of all but one rank of "
        "{model.tensor_model_parallel_size=}"
    )
    return [refusal(model, "model.mcore.softmax_type", rule, "Set the size to 1, or remove softmax_type.")]
