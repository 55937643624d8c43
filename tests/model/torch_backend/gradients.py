"""Gradients of one model at a parallel layout, as complete tensors, from the modules of the torch backend."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_mtp.mcore.groups import destroy_model_parallel, init_model_parallel
from megatron_mtp.model.initial_weights import fill_initial_weights
from megatron_mtp.model.sharded import gather_parts, gradient_parts, whole_tensors
from megatron_mtp.model.torch_backend import TorchSpecProvider, build_layer_spec
from tests.model.torch_backend.tiny import delta_net_config, dense_config, mla_config, moe_config

CONFIGS = {"dense": dense_config, "mla": mla_config, "moe": moe_config, "delta_net": delta_net_config}
VOCAB, SEQ = 64, 16


def gradients(kind: str, fields: dict[str, object], upstream_mla: bool = False) -> dict[str, Tensor] | None:
    """Every parameter's gradient of mean cross entropy plus one MTP depth; on rank 0, None elsewhere.

    All data-parallel ranks read the same tokens, so the layout must not matter. Weights depend on names only.

    Args:
        kind: of CONFIGS.
        fields: of the TransformerConfig, parallel sizes included.
        upstream_mla: use Megatron-Core's own MLA module.
    """
    tp = fields.get("tensor_model_parallel_size", 1)
    ep, etp = fields.get("expert_model_parallel_size", 1), fields.get("expert_tensor_parallel_size", tp)
    groups = init_model_parallel(tp=tp, pp=1, vp=None, cp=1, ep=ep, etp=etp, embedding_stages=[0])
    try:
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = CONFIGS[kind](mtp_num_layers=1, **fields)
        layer = build_layer_spec(config, is_moe=kind == "moe")
        linear = build_layer_spec(config, is_moe=False, is_linear=True) if kind == "delta_net" else layer
        model = _model(config, [linear, layer], upstream_mla, groups)
        fill_initial_weights([model], seed=7, std=0.2, num_layers=2)
        _perturb_vectors(model)
        ddp = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=False), model)
        tokens = torch.randint(0, VOCAB, (2, SEQ + 1), generator=torch.Generator().manual_seed(2))
        positions = torch.arange(SEQ).expand(2, -1)
        loss_mask = torch.ones(2, SEQ)
        ddp(tokens[:, :-1], positions, None, labels=tokens[:, 1:], loss_mask=loss_mask).mean().backward()
        finalize_model_grads([ddp], pg_collection=groups)
        parts = gather_parts(gradient_parts([ddp]))
        return None if parts is None else whole_tensors(parts)[0]
    finally:
        destroy_model_parallel()


def _model(config: object, layers: list[ModuleSpec], upstream_mla: bool, groups: ProcessGroupCollection) -> GPTModel:
    """One layer of each spec; the MTP layer is of the kind of the last."""
    if upstream_mla:
        layers[-1].submodules.self_attention.module = MLASelfAttention
    provider = TorchSpecProvider()
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=provider.layer_norm()),
        VOCAB,
        SEQ,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec_for_backend(config, layers[-1], provider),
        pg_collection=groups,
    )


def _perturb_vectors(model: GPTModel) -> None:
    # Norm weights of 1 would hide a norm that is left out of a backward pass.
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in name:
            parameter.data.add_(torch.linspace(-0.3, 0.3, parameter.numel()))


def worst_difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """Largest |got - want| / |want| over all parameters, and its name."""
    assert got.keys() == want.keys()
    relative = {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in want}
    name = max(relative, key=relative.__getitem__)
    return relative[name], name
