"""Transformer modules on plain PyTorch, for CPUs and for GPUs without Transformer Engine."""

from megatron_mtp.model.torch_backend.gated_delta_net import ExactGatedDeltaNet, PlainNorm
from megatron_mtp.model.torch_backend.mla import ExactMLASelfAttention
from megatron_mtp.model.torch_backend.provider import TorchSpecProvider, build_layer_spec

__all__ = ["ExactGatedDeltaNet", "ExactMLASelfAttention", "PlainNorm", "TorchSpecProvider", "build_layer_spec"]
