"""ModelConfig -> Megatron-Core's TransformerConfig."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_mtp.config.knob import Transfer, mcore_fields
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.model.dtypes import TORCH_DTYPES
from megatron_mtp.parallel.resolve import ResolvedRun
from megatron_mtp.parallel.shape import has_grouped_experts

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "squared_relu": squared_relu}


def transformer_config(run: ResolvedRun, *, use_te: bool, device_type: str) -> TransformerConfig:
    """Megatron-Core's config of a run.

    Args:
        run: the resolved run.
        use_te: Transformer Engine modules do the work.
        device_type: "cuda" or "cpu"; gloo needs point-to-point messages one by one.
    """
    cfg, layout, model = run.cfg, run.layout, run.cfg.model
    kinds: dict[Transfer, bool] = {
        "same": True,
        "mla": model.multi_latent_attention,
        "moe": bool(model.num_moe_experts),
    }
    names = mcore_fields(ModelConfig, {kind for kind, is_used in kinds.items() if is_used})
    fields: dict[str, Any] = {name: deepcopy(getattr(model, name)) for name in names}  # Megatron-Core may change lists
    dtype = TORCH_DTYPES[cfg.precision.dtype]
    fields |= {
        "activation_func": ACTIVATIONS[model.activation_func],
        "mtp_num_layers": run.depths.count or None,
        "virtual_pipeline_model_parallel_size": layout.megatron_vp,
        "pipeline_model_parallel_layout": layout.string if layout.pp > 1 else None,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "transformer_impl": "transformer_engine" if use_te else "local",
        # The loss function divides by the global counts itself (objective/objective.py).
        "calculate_per_token_loss": False,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "deterministic_mode": cfg.train.deterministic and use_te,
        # Weights are set from the seed and the parameter's name after the model is built (model/initial_weights.py).
        "perform_initialization": True,
        "use_cpu_initialization": False,
        "cp_comm_type": "p2p" if use_te and model.context_parallel_size > 1 else None,
    }
    fields |= _communication(interleaved=layout.vp > 1, on_gpu=device_type == "cuda")
    if model.num_moe_experts:
        fields["moe_grouped_gemm"] = has_grouped_experts(model, use_te=use_te, is_cpu=device_type == "cpu")
    fields |= {name: _engine_value(name, deepcopy(value)) for name, value in model.mcore.items()}
    config_class = MLATransformerConfig if model.multi_latent_attention else TransformerConfig
    config = config_class(**fields)
    config.latent_norm_epsilon = model.latent_norm_epsilon  # no field of Megatron-Core; ExactMLASelfAttention reads it
    return config


def _engine_value(name: str, value: Any) -> Any:
    """A value of model.mcore as TransformerConfig wants it: YAML has neither enums nor tuples."""
    if name == "attention_backend":
        return AttnBackend[value]
    return tuple(value) if name == "window_size" and value is not None else value


def _communication(*, interleaved: bool, on_gpu: bool) -> dict[str, Any]:
    """How stages talk. Measured, not chosen: other settings compute wrong numbers or deadlock.

    gloo matches messages of two ranks in posting order, so a batch of sends and receives between two stages with
    virtual chunks delivers the wrong tensor, silently. An interleaved schedule with a standalone MTP stage deadlocks
    without the overlapped form.
    """
    return {
        "batch_p2p_comm": on_gpu and not interleaved,
        "overlap_p2p_comm": interleaved,
        "deallocate_pipeline_outputs": on_gpu,
    }
