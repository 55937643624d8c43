"""Names and layouts: the plain model's parameters <-> the state dict of a Megatron-Core 0.19 GPTModel on one rank.

Names are those of Megatron-Core's local specs. One rule describes every tensor: Megatron's rows are those of one or
more plain tensors, cut into `blocks` equal blocks that alternate. One part is a plain copy; [gate, up] in one block
each is `linear_fc1`; [q, k, v] in one block for each key/value group is `linear_qkv`, whose rows run q q k v | q q k v
for two query heads a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.plain_layers import MLP, Attention, Block, LatentAttention, Norm
from tests.reference.plain_model import PlainMTPModel
from tests.reference.plain_moe import MoE

MLA_LINEARS = {
    "q": "linear_q_proj",
    "q_down": "linear_q_down_proj",
    "q_up": "linear_q_up_proj",
    "kv_down": "linear_kv_down_proj",
    "kv_up": "linear_kv_up_proj",
    "o": "linear_proj",
}


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor as alternating row blocks of plain ones."""

    parts: tuple[Tensor, ...]
    blocks: int = 1

    def pack(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Plain layout -> Megatron's."""
        cut = [t.unflatten(0, (self.blocks, -1)) for t in tensors]
        return torch.cat(cut, dim=1).flatten(0, 1)

    def unpack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Megatron's layout -> plain."""
        sizes = [part.shape[0] // self.blocks for part in self.parts]
        return tuple(t.flatten(0, 1) for t in tensor.unflatten(0, (self.blocks, sum(sizes))).split(sizes, dim=1))


def megatron_entries(plain: PlainMTPModel) -> dict[str, Entry]:
    """Every tensor of Megatron's state dict, expert biases (buffers) included."""
    return dict(_entries(plain))


def load_from_megatron(plain: PlainMTPModel, state_dict: Mapping[str, Tensor | None]) -> None:
    """Copies Megatron's weights into the plain model, in the plain model's dtype.

    Raises:
        ValueError: names or shapes differ; all differences are listed.
    """
    entries = megatron_entries(plain)
    given = {name: tensor for name, tensor in state_dict.items() if not name.endswith("_extra_state")}
    problems = [f"not in the plain model: {name}" for name in given if name not in entries]
    for name, entry in entries.items():
        shape = entry.pack(entry.parts).shape
        if name not in given:
            problems.append(f"not in the state dict: {name}")
        elif given[name].shape != shape:
            problems.append(f"{name}: {tuple(given[name].shape)}, the plain model has {tuple(shape)}")
    if problems:
        raise ValueError("\n".join(problems))
    with torch.no_grad():
        for name, entry in entries.items():
            for part, value in zip(entry.parts, entry.unpack(given[name]), strict=True):
                part.copy_(value)


def weights_as_megatron(plain: PlainMTPModel) -> dict[str, Tensor]:
    """The plain weights under Megatron's names, in Megatron's layout and the plain model's dtype."""
    return {name: entry.pack(entry.parts).detach().clone() for name, entry in megatron_entries(plain).items()}


def gradients_as_megatron(plain: PlainMTPModel) -> dict[str, Tensor]:
    """Gradients under Megatron's names and in its layout: zeros where the loss does not reach, nothing for frozen
    tensors.
    """
    entries = {name: e for name, e in megatron_entries(plain).items() if e.parts[0].requires_grad}

    def gradient(part: Tensor) -> Tensor:
        return torch.zeros_like(part) if part.grad is None else part.grad

    return {name: entry.pack(tuple(gradient(part) for part in entry.parts)) for name, entry in entries.items()}


def _entries(plain: PlainMTPModel) -> Iterator[tuple[str, Entry]]:
    yield "embedding.word_embeddings.weight", Entry((plain.embedding.weight,))
    for layer_idx, block in enumerate(plain.layers):
        yield from _block(f"decoder.layers.{layer_idx}.", block)
    yield from _norm("decoder.final_layernorm", plain.final_norm)
    for depth_idx, module in enumerate(plain.mtp):
        prefix = f"mtp.layers.{depth_idx}."
        if module.is_sequential:
            yield from _norm(f"{prefix}enorm", module.enorm)
            yield from _norm(f"{prefix}hnorm", module.hnorm)
            yield f"{prefix}eh_proj.weight", Entry((module.projection.weight,))
        yield from _block(f"{prefix}mtp_model_layer.", module.block)
        yield from _norm(f"{prefix}final_layernorm", module.final_norm)
    if plain.head is not None:
        yield "output_layer.weight", Entry((plain.head.weight,))


def _block(prefix: str, block: Block) -> Iterator[tuple[str, Entry]]:
    yield from _norm(f"{prefix}input_layernorm", block.attention_norm)
    write: Callable = _latent_attention if isinstance(block.attention, LatentAttention) else _attention
    yield from write(f"{prefix}self_attention.", block.attention)
    yield from _norm(f"{prefix}pre_mlp_layernorm", block.mlp_norm)
    yield from (_moe if block.is_moe else _mlp)(f"{prefix}mlp.", block.mlp)


def _norm(name: str, norm: Norm | None) -> Iterator[tuple[str, Entry]]:
    if norm is not None:
        yield f"{name}.weight", Entry((norm.weight,))
        if norm.bias is not None:
            yield f"{name}.bias", Entry((norm.bias,))


def _linear(name: str, *linears: torch.nn.Linear, blocks: int = 1) -> Iterator[tuple[str, Entry]]:
    yield f"{name}.weight", Entry(tuple(linear.weight for linear in linears), blocks)
    if linears[0].bias is not None:
        yield f"{name}.bias", Entry(tuple(linear.bias for linear in linears), blocks)


def _attention(prefix: str, attention: Attention) -> Iterator[tuple[str, Entry]]:
    yield from _linear(f"{prefix}linear_qkv", attention.q, attention.k, attention.v, blocks=attention.cfg.groups)
    yield from _linear(f"{prefix}linear_proj", attention.o)
    yield from _norm(f"{prefix}q_layernorm", attention.q_norm)
    yield from _norm(f"{prefix}k_layernorm", attention.k_norm)


def _latent_attention(prefix: str, attention: LatentAttention) -> Iterator[tuple[str, Entry]]:
    for name, megatron_name in MLA_LINEARS.items():
        if hasattr(attention, name):
            yield from _linear(prefix + megatron_name, getattr(attention, name))
    yield from _norm(f"{prefix}q_layernorm", attention.q_norm)
    yield from _norm(f"{prefix}kv_layernorm", attention.kv_norm)


def _mlp(prefix: str, mlp: MLP) -> Iterator[tuple[str, Entry]]:
    yield from _linear(f"{prefix}linear_fc1", *((mlp.up,) if mlp.gate is None else (mlp.gate, mlp.up)))
    yield from _linear(f"{prefix}linear_fc2", mlp.down)


def _moe(prefix: str, moe: MoE) -> Iterator[tuple[str, Entry]]:
    yield from _linear(f"{prefix}router", moe.router)
    if moe.expert_bias is not None:
        yield f"{prefix}router.expert_bias", Entry((moe.expert_bias,))
    for e, expert in enumerate(moe.experts):
        yield from _mlp(f"{prefix}experts.local_experts.{e}.", expert)
    if moe.shared is not None:
        yield from _mlp(f"{prefix}shared_experts.", moe.shared)
    if moe.shared_gate is not None:
        yield f"{prefix}shared_experts.gate_weight", Entry((moe.shared_gate.weight,))
