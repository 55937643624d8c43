"""Routed experts without Transformer Engine: products of all local experts together, the rest over all tokens at once.

Megatron-Core's SequentialMLP calls one expert after the other: each splits, activates and weights its few tokens by
operators of its own, and autograd joins the pieces. With many experts those calls take longer than the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_mtp.mcore.main_grad import accumulate


class TorchExperts(SequentialMLP):
    """Megatron-Core's experts, with the same parameters, names and checkpoint keys, and one forward pass for all.

    Args:
        is_grouped: products by `torch.nn.functional.grouped_mm`, on a stacked copy of the weights; else one product
            for each expert, written into its rows of one result.
        others: as SequentialMLP.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        *,
        is_grouped: bool = False,
    ):
        super().__init__(num_local_experts, config, submodules, pg_collection, name)
        experts = list(self.local_experts)
        first, second = ([getattr(expert, name) for expert in experts] for name in ("linear_fc1", "linear_fc2"))
        # A tuple: the layers are submodules of their experts already. MLP.forward weights one bias for all rows.
        self._products = (
            _Products(first, gives_bias=True, is_grouped=is_grouped),
            _Products(second, gives_bias=False, is_grouped=is_grouped),
        )
        self._joint = SimpleNamespace(
            config=self.config,
            activation_func=experts[0].activation_func,
            linear_fc1=self._products[0],
            linear_fc2=self._products[1],
        )

    def set_grouped(self, is_grouped: bool) -> None:
        """Computes products in the other way from now on; see `is_grouped`."""
        for products in self._products:
            products.set_grouped(is_grouped)

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Runs every local expert on its tokens.

        Args:
            permuted_local_hidden_states: [n, h], the tokens of expert 0 first.
            tokens_per_expert: [experts]; they sum to n.
            permuted_probs: [n], the routing weights.

        Returns:
            [n, h], each row times its routing weight, in the same order; and no bias.
        """
        if self.config.moe_apply_probs_on_input:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        counts = tokens_per_expert.tolist()
        for products in self._products:
            products.expect(counts)
        joint: Any = self._joint  # what MLP.forward reads of an MLP
        output, _ = MLP.forward(joint, permuted_local_hidden_states, permuted_probs)
        bias = self._products[1].bias_rows()
        return output if bias is None else output + (bias * permuted_probs[:, None]).to(output.dtype), None


class _Products(nn.Module):
    """One linear layer of every expert, in the place of one linear layer of an MLP.

    Args:
        layers: each with a weight [out, in].
        gives_bias: `forward` returns the bias of each row; else only `bias_rows` does.
        is_grouped: see `TorchExperts`.
    """

    def __init__(self, layers: Sequence[nn.Module], *, gives_bias: bool, is_grouped: bool):
        super().__init__()
        self.layers: tuple[Any, ...] = tuple(layers)
        self.gives_bias, self.is_grouped = gives_bias, is_grouped
        self.counts: list[int] = []

    def set_grouped(self, is_grouped: bool) -> None:
        """See `TorchExperts`."""
        self.is_grouped = is_grouped

    def expect(self, counts: list[int]) -> None:
        """The number of rows of each expert in the calls that follow."""
        self.counts = counts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[n, in], in the order of the experts -> [n, out], and the bias that is still to be added."""
        for layer in self.layers:  # its forward is not called, and with overlap_param_gather DDP waits before it
            for hook in layer._forward_pre_hooks.values():
                hook(layer, (x,))
        weights = [layer.weight for layer in self.layers]
        output = _ExpertProducts.apply(x, self.counts, self.layers, self.is_grouped, *weights)
        return output, self.bias_rows() if self.gives_bias else None

    def bias_rows(self) -> Tensor | None:
        """[n, out], each row's expert's bias; None: the layers have none."""
        if self.layers[0].bias is None:
            return None
        biases = torch.stack([layer.bias for layer in self.layers])
        return biases.repeat_interleave(torch.tensor(self.counts, device=biases.device), dim=0)


class _ExpertProducts(torch.autograd.Function):
    """Rows of x [n, in] times the transposed weight [out, in] of their expert -> [n, out]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, counts: list[int], layers: tuple[Any, ...], is_grouped: bool, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.counts, ctx.layers, ctx.is_grouped = counts, layers, is_grouped and x.shape[0] > 0
        return _times(x, [weight.t() for weight in weights], counts, ctx.is_grouped)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad = grad.contiguous()  # grouped_mm takes no expanded gradient
        of_x = _times(grad, weights, ctx.counts, ctx.is_grouped) if ctx.needs_input_grad[0] else None
        of_weights: list[Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[4:]):
            of_weights = _weight_gradients(ctx, x, grad)
        return (of_x, None, None, None, *of_weights)


def _times(x: Tensor, matrices: list[Tensor], counts: list[int], is_grouped: bool) -> Tensor:
    """The rows of each expert times its matrix [in, out]."""
    if is_grouped:
        return F.grouped_mm(x, torch.stack([matrix.t() for matrix in matrices]).mT, offs=_ends(counts, x.device))
    result = x.new_empty(x.shape[0], matrices[0].shape[1])
    for rows, out, matrix in zip(x.split(counts), result.split(counts), matrices, strict=True):
        torch.mm(rows, matrix, out=out)
    return result


def _weight_gradients(ctx: Any, x: Tensor, grad: Tensor) -> list[Tensor | None]:
    """Gradient of each weight, or what stands for it where it was added to the gradient buffer."""
    if ctx.is_grouped:
        stacked = F.grouped_mm(grad.t(), x, offs=_ends(ctx.counts, x.device))  # [experts, out, in]
        for number, count in enumerate(ctx.counts):
            if not count:
                stacked[number].zero_()  # kernels differ in what they leave where there is nothing to sum
        return list(stacked.unbind())
    pieces = zip(ctx.layers, x.split(ctx.counts), grad.split(ctx.counts), strict=True)
    return [
        accumulate(layer.weight, rows, out) if layer.gradient_accumulation_fusion else out.t() @ rows
        for layer, rows, out in pieces
    ]


def _ends(counts: list[int], device: torch.device) -> Tensor:
    """Row after the last one of each expert, as grouped_mm takes them."""
    return torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
