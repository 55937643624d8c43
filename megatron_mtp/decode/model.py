"""A trained model in the form that decodes: its own forward pass over static caches.

Megatron-Core's modules spend about a millisecond of Python on each layer of each token. This forward pass computes the
same function with about a dozen kernel launches per layer; tests compare it with the training model and with a plain
reference model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mtp.config.depths import Depths
from megatron_mtp.config.filled import filled
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.decode.attention import Cache
from megatron_mtp.decode.block import Block, Depth
from megatron_mtp.decode.linear import Linear, linear
from megatron_mtp.decode.norm import Norm
from megatron_mtp.decode.rope import rotations
from megatron_mtp.decode.span import MaskTable, Span
from megatron_mtp.decode.support import refuse_unsupported
from megatron_mtp.decode.tensor_parallel import TensorParallel
from megatron_mtp.decode.weights import Weights, block, depth
from megatron_mtp.errors import UnsupportedError
from megatron_mtp.parallel.params import moe_pattern, mtp_dense_width


@dataclass(slots=True)
class Decoder:
    """The model of one tensor-parallel rank. Hidden states are replicated on every rank; logits are gathered.

    Args:
        model: finalized config.
        embedding: [v_padded/tp, h], from row `first_id` on.
        depths: MTP layers; a repeated layer is there once.
        head: h -> v_padded/tp.
        draft_head: as `head`, for the drafted ids; see `limit_drafts`.
    """

    model: ModelConfig
    embedding: Tensor
    first_id: int
    blocks: list[Block]
    final_norm: Norm
    depths: list[Depth]
    head: Linear
    tp: TensorParallel
    dtype: torch.dtype
    device: torch.device
    draft_head: Linear

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        tensors: Mapping[str, Tensor | None],
        tp: TensorParallel | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Decoder:
        """From a state dict with the names of Megatron-Core's local specs, which MTPModel has on the torch backend.

        Args:
            model: finalized; its parallel sizes are not read.
            tensors: this rank's shards.
            tp: None: one rank.
            dtype: dtype of weights and residual stream.

        Raises:
            UnsupportedError: the model has a part that decoding does not compute.
        """
        refuse_unsupported(model)
        tp, device = tp or TensorParallel(), torch.device(device)
        weights = Weights(model, tensors, tp, dtype, device)
        widths = [None if is_moe else model.ffn_hidden_size for is_moe in moe_pattern(model)]
        with torch.inference_mode():
            embedding = weights.get("embedding.word_embeddings.weight").to(dtype).clone()
            tied = model.share_embeddings_and_output_weights
            head = weights.linear(embedding if tied else weights.get("output_layer.weight"))
            return cls(
                model=model,
                embedding=embedding,
                first_id=tp.rank * embedding.shape[0],
                blocks=[block(weights, f"decoder.layers.{index}.", width) for index, width in enumerate(widths)],
                final_norm=weights.full_norm("decoder.final_layernorm"),
                depths=[
                    depth(weights, f"mtp.layers.{index}.", mtp_dense_width(model))
                    for index in range(Depths.of(model).distinct)
                ],
                head=head,
                draft_head=head,
                tp=tp,
                dtype=dtype,
                device=device,
            )

    @property
    def vocab_size(self) -> int:
        """Token ids are below it; the padded vocabulary is larger."""
        return filled(self.model.vocab_size)

    @property
    def is_parallel(self) -> bool:
        """Whether MTP depths read only the trunk, so that at most D tokens can be drafted."""
        return self.model.mtp_variant == "parallel"

    def embed(self, tokens: Tensor) -> Tensor:
        """[n] ids -> [n, h]."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.embedding)
        local = tokens - self.first_id
        inside = (local >= 0) & (local < self.embedding.shape[0])
        rows = F.embedding(local.clamp(0, self.embedding.shape[0] - 1), self.embedding)
        return self.tp.reduce(rows * inside[:, None])

    def trunk(self, tokens: Tensor, span: Span, caches: list[Cache]) -> tuple[Tensor, Tensor]:
        """Runs the trunk.

        Args:
            tokens: [b, q] ids for the slots of `span`.
            caches: one for each trunk layer.

        Returns:
            [b * q, h] for the head, and [b * q, h] for depth 1; they differ if mtp_hidden_source = pre_final_norm.
        """
        x = self.blocks[-1](self.below_last(tokens, span, caches), span, caches[-1])
        normed = self.final_norm(x)
        return normed, (x if self.model.mtp_hidden_source == "pre_final_norm" else normed)

    def below_last(self, tokens: Tensor, span: Span, caches: list[Cache]) -> Tensor:
        """The residual stream [b * q, h] before the trunk's last layer. Arguments as `trunk`."""
        x = self.embed(tokens.flatten())
        for layer, cache in zip(self.blocks[:-1], caches[:-1], strict=True):
            x = layer(x, span, cache)
        return x

    def depth(self, number: int, hidden: Tensor, tokens: Tensor, span: Span, cache: Cache) -> Tensor:
        """Runs MTP depth `number`, counted from 1; beyond D the last layer is used again.

        Args:
            hidden: [b * q, h] of the previous depth, at the slots of `span`.
            tokens: [b, q]: t[i + number] for slot i.
        """
        layer = self.depths[min(number, len(self.depths)) - 1]
        embedded = None if layer.input is None else self.embed(tokens.flatten())
        return layer(hidden, embedded, span, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, h] -> [n, vocab_size], the same bits on every rank."""
        return self.tp.gather(self.head(hidden), dim=-1)[:, : self.vocab_size]

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """[n, h] -> [n, number of drafted ids]."""
        return self.tp.gather(self.draft_head(hidden), dim=-1)[:, : self.vocab_size]

    def limit_drafts(self, weight: Tensor, num_ids: int | None) -> None:
        """Drafts only the `num_ids` lowest ids, the most frequent tokens; verification uses the full vocabulary.

        With a big vocabulary most of a draft's cost is the head. Source: FastMTP, arXiv 2509.18362, section 3.3.

        Args:
            weight: [v_padded, h], the head's.
            num_ids: None: all ids.

        Raises:
            UnsupportedError: the head is sharded.
        """
        if num_ids is None or num_ids >= self.vocab_size:
            self.draft_head = self.head
            return
        if self.tp.size > 1:
            raise UnsupportedError(
                f"draft_vocab = {num_ids}: the head is sharded over {self.tp.size} tensor-parallel ranks. "
                "Draft all ids, or use one rank."
            )
        self.draft_head = linear(weight[:num_ids].to(self.device, self.dtype).clone())

    def new_caches(self, b: int, slots: int, num_depths: int) -> tuple[list[Cache], list[Cache]]:
        """Empty caches for the trunk's layers and for `num_depths` depths, each depth with its own."""
        caches = [layer.attention.new_cache(b, slots, self.dtype, self.device) for layer in self._layers(num_depths)]
        return caches[: len(self.blocks)], caches[len(self.blocks) :]

    def cache_bytes(self, b: int, slots: int, num_depths: int) -> int:
        """Bytes of what `new_caches` returns, on this rank."""
        values = sum(layer.attention.values_of_slot for layer in self._layers(num_depths))
        return values * b * slots * torch.empty((), dtype=self.dtype).element_size()

    def _layers(self, num_depths: int) -> list[Block]:
        return [*self.blocks, *(self.depths[min(k, len(self.depths)) - 1].block for k in range(1, num_depths + 1))]

    def positions(self, slots: int) -> tuple[MaskTable, Tensor | None]:
        """Masks and rotations for spans over `slots` slots."""
        return MaskTable(slots, self.dtype, self.device), rotations(self.model, slots, self.device)
