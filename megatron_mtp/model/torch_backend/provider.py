"""Which module does what on plain PyTorch, and the spec of one transformer layer built from them."""

from __future__ import annotations

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_mtp.model.torch_backend.attention import TorchCoreAttention
from megatron_mtp.model.torch_backend.experts import TorchExperts
from megatron_mtp.model.torch_backend.gated_delta_net import ExactGatedDeltaNet, PlainNorm
from megatron_mtp.model.torch_backend.mla import ExactMLASelfAttention
from megatron_mtp.model.torch_backend.norm import TorchNorm


class TorchSpecProvider(LocalSpecProvider):
    """Megatron-Core's linear layers, with our norms, core attention and experts."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type[TorchNorm]:
        """One class for every norm; the config says which."""
        return TorchNorm

    def core_attention(self) -> type[TorchCoreAttention]:
        """Attention of projected queries, keys and values."""
        return TorchCoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> partial[TorchExperts]:
        """The experts of one rank, with their products in one call or one by one."""
        submodules = super().grouped_mlp_modules(moe_use_grouped_gemm).keywords["submodules"]
        return partial(TorchExperts, submodules=submodules, is_grouped=moe_use_grouped_gemm)


def build_layer_spec(config: TransformerConfig, is_moe: bool, *, is_linear: bool = False) -> ModuleSpec:
    """The spec of one transformer layer, of the trunk or of an MTP layer.

    Args:
        config: decides between multi-head and multi-latent attention, and about norms of queries and keys.
        is_moe: mixture of experts in place of the dense feed-forward block.
        is_linear: the gated delta net in place of attention.

    Returns:
        ModuleSpec of a TransformerLayer. Parameters are saved under the names that Transformer Engine's layers use, so
        a checkpoint can be read with either backend.
    """
    provider = TorchSpecProvider()
    if is_linear:
        attention, renames = _gated_delta_net(provider)
    elif config.multi_latent_attention:
        attention, renames = _multi_latent_attention(config, provider)
    else:
        attention, renames = _multi_head_attention(config, provider)
    if not is_moe:
        renames["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=provider.layer_norm(),
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=provider.layer_norm(),
            mlp=get_mlp_module_spec_for_backend(
                provider,
                num_experts=config.num_moe_experts if is_moe else None,
                moe_grouped_gemm=config.moe_grouped_gemm,
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=renames,
        ),
    )


def _multi_head_attention(config: TransformerConfig, provider: TorchSpecProvider) -> tuple[ModuleSpec, dict[str, str]]:
    qk_norm = provider.layer_norm() if config.qk_layernorm else IdentityOp
    spec = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return spec, {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def _gated_delta_net(provider: TorchSpecProvider) -> tuple[ModuleSpec, dict[str, str]]:
    spec = ModuleSpec(
        module=ExactGatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=provider.column_parallel_linear(), out_norm=PlainNorm, out_proj=provider.row_parallel_linear()
        ),
    )
    return spec, {"input_layernorm.": "self_attention.in_proj.layer_norm_"}


def _multi_latent_attention(
    config: TransformerConfig, provider: TorchSpecProvider
) -> tuple[ModuleSpec, dict[str, str]]:
    linear = provider.column_parallel_linear()
    kv_norm = provider.layer_norm() if config.qk_layernorm else IdentityOp
    spec = ModuleSpec(
        module=ExactMLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=linear,
            linear_q_down_proj=linear,
            linear_q_up_proj=linear,
            linear_kv_down_proj=linear,
            linear_kv_up_proj=linear,
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=kv_norm if config.q_lora_rank is not None else IdentityOp,
            kv_layernorm=kv_norm,
        ),
    )
    return spec, {
        "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
        "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    }
