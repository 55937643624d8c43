"""Runs one training step of the real program on one rank and of the plain model in fp64, on the same weights and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.batch import GlobalBatch, MicroBatch, count_targets
from megatron_mtp.data.shift import depth_targets
from megatron_mtp.recipes.tiny import tiny_dense_pretrain_config
from tests.reference.plain_model import PlainConfig, PlainMTPModel, combine
from tests.reference.weights import gradients_as_megatron, weights_as_megatron

SEQ_LENGTH = 16


@dataclass
class Figures:
    """What is compared. `gradients` and `expert_biases` have Megatron's names and layouts."""

    losses: list[float]
    counts: list[int]
    acceptance: list[list[int]]
    gradients: dict[str, Tensor]
    routing_maps: list[Tensor]
    """[b, s, E] bool of each router call: micro-batch by micro-batch, trunk layers, then depths."""
    expert_biases: dict[str, Tensor] = field(default_factory=dict)
    router: dict[str, float] = field(default_factory=dict)


def run_config(plain: PlainConfig, micro_batch_size: int, num_micro_batches: int) -> ConfigContainer:
    """A run of one rank whose model is `plain`."""
    cfg = tiny_dense_pretrain_config()
    for name, value in model_fields(plain).items():
        setattr(cfg.model, name, value)
    cfg.model.seq_length = SEQ_LENGTH
    cfg.train.micro_batch_size = micro_batch_size
    cfg.train.global_batch_size = micro_batch_size * num_micro_batches
    cfg.optimizer.clip_grad = 0.0  # gradients are read after the step
    cfg.dist.device = "cpu"
    cfg.dist.num_threads = 1
    return cfg.finalize(world_size=1)


def model_fields(plain: PlainConfig) -> dict[str, object]:
    """ModelConfig's fields for the plain model's numbers."""
    fields = {
        "num_layers": plain.num_layers,
        "hidden_size": plain.hidden_size,
        "num_attention_heads": plain.num_heads,
        "vocab_size": plain.vocab_size,
        "make_vocab_size_divisible_by": plain.rows_of_embedding,
        "num_query_groups": plain.groups,
        "kv_channels": plain.width_of_head,
        "ffn_hidden_size": plain.ffn_size,
        "position_embedding_type": "rope" if plain.rope_base else "none",
        "rotary_base": plain.rope_base or 10000.0,
        "rotary_percent": plain.rope_percent,
        "normalization": plain.normalization,
        "layernorm_epsilon": plain.eps,
        "layernorm_zero_centered_gamma": plain.zero_centered_gamma,
        "qk_layernorm": plain.qk_norm or (plain.latent is not None and plain.latent.latent_norms),
        "activation_func": plain.activation,
        "gated_linear_unit": plain.gated,
        "share_embeddings_and_output_weights": plain.tied,
        "add_bias_linear": plain.bias,
        "add_qkv_bias": plain.qkv_bias,
        "mtp_num_layers": plain.num_depths,
        "mtp_variant": plain.mtp_variant,
        "mtp_use_repeated_layer": plain.mtp_repeated,
        "mtp_detach_heads": plain.mtp_detach,
        "mtp_freeze_trunk": plain.mtp_freeze_trunk,
        "mtp_hidden_source": plain.mtp_hidden,
        "mtp_loss_scaling_factor": plain.mtp_lambda,
        "mtp_depth_weights": list(plain.mtp_weights) if plain.mtp_weights else None,
        "logits_z_loss_coeff": plain.logits_z_coeff,
        "logits_chunk_tokens": 7,  # an uneven last chunk
    }
    if plain.latent is not None:
        latent = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
        fields |= {"multi_latent_attention": True} | {name: getattr(plain.latent, name) for name in latent}
    if plain.moe is not None:
        fields |= _moe_fields(plain)
    return fields


def _moe_fields(plain: PlainConfig) -> dict[str, object]:
    moe = plain.moe
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(plain.is_moe(layer_idx)) for layer_idx in range(plain.num_layers)],
        "moe_ffn_hidden_size": moe.ffn_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_router_topk": moe.topk,
        "moe_router_score_function": moe.score_function,
        "moe_router_pre_softmax": moe.pre_softmax,
        "moe_router_num_groups": moe.num_groups,
        "moe_router_group_topk": moe.group_topk,
        "moe_router_topk_scaling_factor": None if moe.scaling_factor == 1.0 else moe.scaling_factor,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_router_load_balancing_type": "seq_aux_loss" if moe.seq_aux_coeff else "none",
        "moe_aux_loss_coeff": moe.seq_aux_coeff,
        "moe_z_loss_coeff": moe.z_coeff or None,
    }


def micro_batch(tokens: Tensor, base_mask: Tensor, segment_ids: Tensor | None, num_depths: int) -> MicroBatch:
    """The program's micro-batch, its depths made by the data room.

    Args:
        tokens: [b, s+1].
        base_mask: [b, s].
        segment_ids: [b, s+1] or None.
    """
    documents = None if segment_ids is None else segment_ids.numpy()
    targets = depth_targets(tokens.numpy(), num_depths, base_mask.numpy(), documents)
    return MicroBatch(
        tokens=tokens[:, :-1].contiguous(),
        position_ids=torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1).contiguous(),
        shifted_ids=torch.from_numpy(targets.shifted_ids),
        labels=torch.from_numpy(targets.labels),
        loss_mask=torch.from_numpy(targets.loss_mask),
        segment_ids=None if segment_ids is None else segment_ids[:, :-1].to(torch.int32).contiguous(),
    )


def plain_figures(model: PlainMTPModel, batches: list[dict[str, Tensor | None]]) -> Figures:
    """The step of the judge. Updates its expert biases."""
    outputs = [model(**batch) for batch in batches]
    totals = combine(outputs)
    model.zero_grad()
    totals.total.backward()
    if model.cfg.moe is not None and model.cfg.moe.expert_bias:
        model.update_expert_biases(totals)
    biases = {name: w for name, w in weights_as_megatron(model).items() if name.endswith("expert_bias")}
    return Figures(
        losses=totals.losses.tolist(),
        counts=totals.counts.tolist(),
        acceptance=sum(output.acceptance for output in outputs).tolist(),
        gradients=gradients_as_megatron(model),
        routing_maps=[router.chosen for output in outputs for router in output.routers],
        expert_biases=biases,
        router=_mean_over_layers(model, totals.router_losses),
    )


def _mean_over_layers(model: PlainMTPModel, router_losses: dict[str, Tensor]) -> dict[str, float]:
    """The program reports means over MoE layers, under Megatron's names, of what the total weighs."""
    moe = model.cfg.moe
    if moe is None:
        return {}
    num_layers = len(set(model.routed_blocks()))
    names = {"load_balancing_loss": ("seq_load_balancing_loss", moe.seq_aux_coeff), "z_loss": ("z_loss", moe.z_coeff)}
    return {
        reported: float(router_losses[name].detach()) / num_layers for name, (reported, coeff) in names.items() if coeff
    }


def program_figures(model: PlainMTPModel, batches: list[dict[str, Tensor | None]]) -> Figures:
    """The same step through `training.setup` and `Engine.train`, with the judge's weights."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_mtp.training.setup import setup

    plain = model.cfg
    batch_size = batches[0]["tokens"].shape[0]
    run = setup(run_config(plain, batch_size, len(batches)))
    try:
        chunk = run.engine.chunks[0].module
        weights = {name: w.float() for name, w in weights_as_megatron(model).items()}
        extra = {name: state for name, state in chunk.state_dict().items() if name.endswith("_extra_state")}
        chunk.load_state_dict(weights | extra, strict=True)
        maps: list[Tensor] = []
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(lambda _, __, output: maps.append(_batch_first(output[1], batch_size)))
        micro_batches = [micro_batch(**batch, num_depths=plain.num_depths) for batch in batches]
        result = run.engine.train(
            GlobalBatch(
                step=0,
                sample_ids=np.arange(batch_size * len(batches)),
                places=np.arange(batch_size * len(batches)).reshape(len(batches), batch_size),
                micro_batches=micro_batches,
                num_targets=count_targets(micro_batches),
            ),
            loss_factor=plain.mtp_lambda,
        )
        return Figures(
            losses=result.losses,
            counts=result.depth_counts.tolist(),
            acceptance=result.acceptance.tolist(),
            gradients={n: p.main_grad.clone() for n, p in chunk.named_parameters() if p.requires_grad},
            routing_maps=maps,
            expert_biases={n: t.clone() for n, t in chunk.state_dict().items() if n.endswith("expert_bias")},
            router=result.router,
        )
    finally:
        run.close()


def _batch_first(routing_map: Tensor, batch_size: int) -> Tensor:
    """[s * b, E] -> [b, s, E]."""
    return routing_map.unflatten(0, (-1, batch_size)).transpose(0, 1).clone()


def gradient_errors(got: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """|g - r| / max(|r|, 1e-3 * global norm / sqrt(number of tensors)) for each tensor, 2-norms, r in fp64.

    The floor keeps a tensor whose gradient is next to nothing from being judged by rounding alone.
    """
    assert got.keys() == reference.keys()
    global_norm = sum(r.norm() ** 2 for r in reference.values()) ** 0.5
    floor = 1e-3 * global_norm / len(reference) ** 0.5
    return {name: float((got[name].double() - r).norm() / max(r.norm(), floor)) for name, r in reference.items()}


def whole_error(got: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """|g - r| / |r| of all tensors as one vector."""
    difference = sum((got[name].double() - r).norm() ** 2 for name, r in reference.items())
    return float((difference / sum(r.norm() ** 2 for r in reference.values())) ** 0.5)
