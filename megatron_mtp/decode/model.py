"""A trained model in the form that decodes: its own forward pass over static caches.

Megatron-Core's modules spend about a millisecond of Python on each layer of each token. This forward pass computes the same function with about a dozen kernel launches a
layer; tests hold it against the training model and against the plain reference model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mtp.config.mcore.table import MCORE_FIELDS
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.decode.attention import Cache
from megatron_mtp.decode.block import Block, Depth
from megatron_mtp.decode.linear import Linear, linear
from megatron_mtp.decode.norm import Norm
from megatron_mtp.decode.rope import rotations
from megatron_mtp.decode.span import MaskTable, Span
from megatron_mtp.decode.tensor_parallel import TensorParallel
from megatron_mtp.decode.weights import Source, block, depth
from megatron_mtp.errors import UnsupportedError
from megatron_mtp.parallel.params import moe_pattern

# Fields of model.mcore that change how the training model computes but not what.
HARMLESS_MCORE = (
    "apply_rope_fusion",
    "attention_backend",
    "attention_softmax_in_fp32",
    "bias_activation_fusion",
    "bias_swiglu_fusion",
)
HARMLESS_MCORE += (
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "memory_efficient_layer_norm",
    "persist_layer_norm",
)


@dataclass(slots=True)
class Decoder:
    """The model of one tensor-parallel rank. Hidden states are whole on every rank, logits are gathered.

    Args:
        model: finalized config.
        embedding: [v_padded/tp, h], rows `first_id` and on.
        depths: MTP layers; a repeated layer stands once.
        head: h -> v_padded/tp.
        draft_head: as `head`, for the ids that are drafted; see `limit_drafts`.
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
        """From a state dict with the names of Megatron-Core's local specs: of MTPModel on the torch backend, or made by hand.

        Args:
            model: finalized; its parallel sizes are not read.
            tensors: this rank's shards.
            tp: None: one rank.
            dtype: of weights and residual stream.

        Raises:
            UnsupportedError: the model has a part that decoding does not compute.
        """
        refuse_unsupported(model)
        tp, device = tp or TensorParallel(), torch.device(device)
        source = Source(model, tensors, tp, dtype, device)
        kinds = moe_pattern(model)
        depths = model.mtp_num_layers or 0
        copies = min(depths, 1) if model.mtp_use_repeated_layer else depths
        with torch.inference_mode():
            embedding = source.get("embedding.word_embeddings.weight").to(dtype).clone()
            tied = model.share_embeddings_and_output_weights
            weight = embedding if tied else source.get("output_layer.weight")
            head = source.linear(weight)
            return cls(
                model=model,
                embedding=embedding,
                first_id=tp.rank * embedding.shape[0],
                blocks=[block(source, f"decoder.layers.{index}.", is_moe) for index, is_moe in enumerate(kinds)],
                final_norm=source.full_norm("decoder.final_layernorm"),
                depths=[depth(source, f"mtp.layers.{index}.", kinds[-1]) for index in range(copies)],
                head=head,
                draft_head=head,
                tp=tp,
                dtype=dtype,
                device=device,
            )

    @property
    def is_parallel(self) -> bool:
        """Whether MTP depths read the trunk alone, so that there are no more than D."""
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
            [b * q, h] for the head, and [b * q, h] for depth 1 (the same but with mtp_hidden_source = pre_final_norm).
        """
        x = self.blocks[-1](self.below_last(tokens, span, caches), span, caches[-1])
        normed = self.final_norm(x)
        return normed, (x if self.model.mtp_hidden_source == "pre_final_norm" else normed)

    def below_last(self, tokens: Tensor, span: Span, caches: list[Cache]) -> Tensor:
        """The part of `trunk` below its last layer: [b * q, h] of the residual stream."""
        x = self.embed(tokens.flatten())
        for layer, cache in zip(self.blocks[:-1], caches[:-1], strict=True):
            x = layer(x, span, cache)
        return x

    def depth(self, number: int, hidden: Tensor, tokens: Tensor, span: Span, cache: Cache) -> Tensor:
        """Runs MTP depth `number`, counted from 1; beyond D the last layer goes on.

        Args:
            hidden: [b * q, h] of the depth before, at the slots of `span`.
            tokens: [b, q]: t[i + number] for slot i.
        """
        layer = self.depths[min(number, len(self.depths)) - 1]
        embedded = None if layer.projection is None else self.embed(tokens.flatten())
        return layer(hidden, embedded, span, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, h] -> [n, vocab_size], the same bits on every rank."""
        return self.tp.gather(self.head(hidden), dim=-1)[:, : self.model.vocab_size]

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """[n, h] -> [n, number of ids that are drafted]."""
        return self.tp.gather(self.draft_head(hidden), dim=-1)[:, : self.model.vocab_size]

    def limit_drafts(self, weight: Tensor, num_ids: int | None) -> None:
        """Drafts the `num_ids` lowest ids only, which tokenizers give to the most frequent tokens; verification knows all.

        The head is most of what a draft costs where the vocabulary is big. Source: FastMTP, arXiv 2509.18362, section 3.3.

        Args:
            weight: [v_padded, h] of the head.
            num_ids: None: all.

        Raises:
            UnsupportedError: the head is sharded.
        """
        if num_ids is None or num_ids >= self.model.vocab_size:
            self.draft_head = self.head
            return
        if self.tp.size > 1:
            raise UnsupportedError(
                f"draft_vocab = {num_ids}: the head is sharded over {self.tp.size} tensor-parallel ranks. Draft all ids, or use one rank."
            )
        self.draft_head = linear(weight[:num_ids].to(self.device, self.dtype).clone())

    def new_caches(self, b: int, slots: int, num_depths: int) -> tuple[list[Cache], list[Cache]]:
        """Empty caches for the trunk's layers and for `num_depths` depths, each depth with its own."""
        layers = [*self.blocks, *(self.depths[min(k, len(self.depths)) - 1].block for k in range(1, num_depths + 1))]
        made = [layer.attention.new_cache(b, slots, self.dtype, self.device) for layer in layers]
        return made[: len(self.blocks)], made[len(self.blocks) :]

    def cache_bytes(self, b: int, slots: int, num_depths: int) -> int:
        """Size of what `new_caches` makes, on this rank."""
        layers = [*self.blocks, *(self.depths[min(k, len(self.depths)) - 1].block for k in range(1, num_depths + 1))]
        values = sum(layer.attention.values_of_slot for layer in layers)
        return values * b * slots * torch.empty((), dtype=self.dtype).element_size()

    def positions(self, slots: int) -> tuple[MaskTable, Tensor | None]:
        """What spans over `slots` slots are made with."""
        return MaskTable(slots, self.dtype, self.device), rotations(self.model, slots, self.device)


def refuse_unsupported(model: ModelConfig) -> None:
    """Raises UnsupportedError for a model that decoding would compute wrongly; all problems at once."""
    problems = []
    if model.position_embedding_type == "learned_absolute":
        problems.append(
            "model.position_embedding_type = learned_absolute: decoding has rotary positions and none only."
        )
    if model.attention_output_gate:
        problems.append("model.attention_output_gate = True: decoding does not compute gated attention.")
    if model.experimental_attention_variant:
        problems.append(
            f"model.experimental_attention_variant = {model.experimental_attention_variant}: decoding has no linear attention."
        )
    for name, value in model.mcore.items():
        if name not in HARMLESS_MCORE and value != MCORE_FIELDS[name][1]:
            problems.append(
                f"model.mcore.{name} = {value!r}: it is not known whether this changes what the model computes. "
                "Export the model and decode it with transformers, or leave the field at its default."
            )
    if problems:
        raise UnsupportedError(problems)
