"""Gradients of linear layers and embeddings go straight into DDP's buffers, on a CPU.

Otherwise each of them is made beside the buffer in the size of its weight, and then added: for weights that see few
tokens in a step that takes as long as the product itself. Megatron-Core has the same for linear layers on GPUs
(`gradient_accumulation_fusion`), with a kernel of Apex.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, layers
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mtp.mcore.patches import replaced

_KERNELS = "fused_weight_gradient_mlp_cuda"


def install() -> None:
    """Gives Megatron-Core's linear layers the products that they look for in Apex, where it is not installed."""
    if not hasattr(layers, _KERNELS):
        setattr(layers, _KERNELS, _Products)


def uninstall() -> None:
    """Undoes `install`."""
    if getattr(layers, _KERNELS, None) is _Products:
        delattr(layers, _KERNELS)


def embedding_class() -> AbstractContextManager[None]:
    """Inside, a GPTModel builds its embedding from `InPlaceEmbedding`."""
    return replaced(tensor_parallel, VocabParallelEmbedding=InPlaceEmbedding)


def add_in_place(chunks: Sequence[DistributedDataParallel]) -> None:
    """From now on the linear layers and embeddings of these chunks add to their weights' `main_grad` themselves."""
    if getattr(layers, _KERNELS, None) is not _Products:  # Apex's kernels are for GPUs
        return
    for chunk in chunks:
        for module in chunk.modules():
            weight: Any = getattr(module, "weight", None)
            if getattr(weight, "main_grad", None) is None or weight.device.type != "cpu":
                continue
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module.gradient_accumulation_fusion = True
            elif isinstance(module, InPlaceEmbedding):  # with the overlap, DDP waits for a gradient in `.grad`
                module.adds_in_place = not chunk.ddp_config.overlap_grad_reduce


class _Products:
    """What Megatron-Core calls: total_input [n, in], grad_output [n, out], main_grad [out, in]."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        if total_input.dtype == main_grad.dtype:
            main_grad.addmm_(grad_output.t(), total_input)
        else:
            main_grad.add_(grad_output.t() @ total_input)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def accumulate(weight: Any, total_input: Tensor, grad_output: Tensor) -> Tensor | None:
    """Adds the gradient of a linear layer's weight to its `main_grad`.

    Args:
        weight: [out, in], of a chunk for which `add_in_place` was called.
        total_input: [n, in].
        grad_output: [n, out].

    Returns:
        What the layer gives to autograd for it. DDP's hook runs only for a gradient, and ignores the content of this.
    """
    _Products.wgrad_gemm_accum_fp32(total_input, grad_output, weight.main_grad)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


class InPlaceEmbedding(VocabParallelEmbedding):
    """Megatron-Core's embedding, whose gradient has the rows of the tokens only once `adds_in_place` is set."""

    adds_in_place = False

    def forward(self, input_: Tensor) -> Tensor:
        """input_: [b, s] ids -> [b, s, h], or [s/tp, b, h] with `reduce_scatter_embeddings`."""
        if not (self.adds_in_place and torch.is_grad_enabled()):
            return super().forward(input_)
        with replaced(layers, F=_Functional):
            return super().forward(input_)


class _Functional:
    """In the place of `torch.nn.functional` while the embedding runs."""

    @staticmethod
    def embedding(ids: Tensor, weight: Tensor) -> Tensor:
        return _Rows.apply(ids, weight)


class _Rows(torch.autograd.Function):
    """weight[ids], whose gradient is added to the rows of `weight.main_grad`."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor | None]:
        (ids,) = ctx.saved_tensors
        main_grad = ctx.weight.main_grad
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        main_grad.index_add_(0, ids.reshape(-1), rows.to(main_grad.dtype))
        return None, None
