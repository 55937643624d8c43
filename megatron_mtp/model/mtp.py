"""Megatron-Core's GPTModel with MTP layers that read ready-made shifted ids and never roll anything.

The model owns no loss: on the last stage it hands the hidden states of all depths to the `output_processor` it is
called with (the objective's), and returns what that returns.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock, MultiTokenPredictionLayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_mtp.errors import ConfigError
from megatron_mtp.mcore.main_grad import embedding_class
from megatron_mtp.mcore.mtp import mtp_block_class
from megatron_mtp.mcore.router import share_z_loss
from megatron_mtp.model.trunk_gradient import TrunkGradient


class DepthInputs(Protocol):
    """What the caller of the model passes as `output_processor_context`."""

    shifted_ids: Tensor  # [D, b, s/cp]: entry k-1 holds t[i+k] at slot i


class MTPLayer(MultiTokenPredictionLayer):
    """One depth: norms of the hidden state and of the embedding of the token k ahead, projection, transformer layer.

    Takes a stack of shifted ids, uses the first and returns the rest, where Megatron-Core rolls one row of ids.
    """

    def _get_embeddings(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        embedding: Callable[..., Tensor],
        hidden_states: Tensor,
        packed_seq_params: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """input_ids: [D', b, s/cp], the depths still to come. Returns the ids of the later depths, [D'-1, b, s/cp]."""
        decoder_input = self._embed(input_ids[0], position_ids, embedding)
        hidden_states = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
        if not hidden_states.requires_grad:
            # A recomputed layer needs one input with a gradient, or its parameters get none.
            hidden_states.requires_grad_(True)
        if decoder_input is None:
            decoder_input = hidden_states
        return input_ids[1:], position_ids, padding_mask, decoder_input, hidden_states

    def _embed(self, ids: Tensor, position_ids: Tensor, embedding: Callable[..., Tensor]) -> Tensor | None:
        """Embeddings [s, b, h] of the tokens k ahead; None where the depth reads the hidden state alone."""
        embedded = embedding(input_ids=ids, position_ids=position_ids)
        return embedded.detach() if self.config.mtp_detach_heads else embedded

    def _checkpointed_forward(self, hidden_states: Tensor, decoder_input: Tensor, **kwargs: Any) -> Tensor:
        """Recomputes the layer in the backward pass, for `uniform` and for `block`.

        Megatron-Core skips `block` with a warning; the block method's budget counts decoder layers, and an MTP layer is
        always recomputed here when layers are recomputed at all. Source: MultiTokenPredictionLayer in Megatron-Core.
        """
        if self.config.fp8 or self.config.fp4:
            return super()._checkpointed_forward(hidden_states=hidden_states, decoder_input=decoder_input, **kwargs)
        names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        fixed = {name: value for name, value in kwargs.items() if name not in names}

        def run(hidden: Tensor, embedded: Tensor, *tensors: Tensor) -> Tensor:
            return self._proj_and_transformer_layer(
                hidden_states=hidden, decoder_input=embedded, **fixed, **dict(zip(names, tensors, strict=True))
            )

        return checkpoint(
            run,
            self.config.distribute_saved_activations,
            hidden_states,
            decoder_input,
            *(kwargs[name] for name in names),
        )


class ParallelMTPLayer(MTPLayer):
    """A depth of the parallel variant: one transformer layer on the trunk's hidden state, no token is looked at.

    With several depths each one is recomputed in the backward pass, whatever the config recomputes elsewhere. Only one
    depth holds its activations at a time, as in the paper's order (forward and backward of one head after the other).
    That costs one more forward pass of each depth's layer. The paper's order saves it, because it knows each head's
    weight in the total beforehand.

    Source: Gloeckle et al. 2024, arXiv 2404.19737, section 2.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Built by the base class for the sequential variant; a depth here reads neither embedding nor projection.
        del self.enorm, self.hnorm, self.eh_proj
        if self.config.mtp_num_layers > 1:
            config = copy(self.config)
            config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
            self.config: TransformerConfig = config

    def _embed(self, ids: Tensor, position_ids: Tensor, embedding: Callable[..., Tensor]) -> None:
        return None

    def _concat_embeddings(self, hidden_states: Tensor, decoder_input: Tensor) -> Tensor:
        return hidden_states


class ParallelMTPBlock(MultiTokenPredictionBlock):
    """D independent depths that all read the trunk. Layers are found where the sequential block has them."""

    def forward(self, input_ids: Tensor, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states: [s, b, h] -> [(1+D) * s, b, h], the trunk's first."""
        trunk = hidden_states.detach() if self.config.mtp_detach_heads else hidden_states
        depths = [layer(input_ids=input_ids, hidden_states=trunk, **kwargs)[0] for layer in self.layers]
        return torch.cat([hidden_states, *depths], dim=0)


@dataclass(frozen=True, slots=True)
class Variant:
    """A form of multi-token prediction: the class of a depth, and the class that calls all depths in order."""

    layer: type[MTPLayer]
    block: type[MultiTokenPredictionBlock] = MultiTokenPredictionBlock


VARIANTS = {"sequential": Variant(MTPLayer), "parallel": Variant(ParallelMTPLayer, ParallelMTPBlock)}


def find_variant(name: str) -> Variant:
    """The variant that `model.mtp_variant` names: one of VARIANTS, or `module:NAME` of a `Variant` of your own.

    Raises:
        ConfigError: there is none, or it is no `Variant`.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.mtp_variant = {name!r}: cannot be imported ({error}).") from error
    if not isinstance(found, Variant):
        raise ConfigError(f"model.mtp_variant = {name!r}: must be a megatron_mtp.model.mtp.Variant, not {found!r}.")
    return found


class MTPModel(GPTModel):
    """One pipeline chunk of the model.

    Args:
        hidden_source: what depth 1 reads, "post_final_norm" or "pre_final_norm"; see ModelConfig.mtp_hidden_source.
        variant: builds the MTP layers; see ModelConfig.mtp_variant.
        others: as GPTModel.
    """

    def __init__(
        self,
        *args: Any,
        hidden_source: str = "post_final_norm",
        variant: Variant = VARIANTS["sequential"],
        **kwargs: Any,
    ):
        with mtp_block_class(variant.block), embedding_class():
            super().__init__(*args, **kwargs)
        if self.mtp_process and self.post_process and self.share_embeddings_and_output_weights and not self.pre_process:
            # The head uses this stage's copy of the embedding; Megatron-Core leaves an unused [v, h] parameter here.
            self.output_layer.weight = None
        if self.mtp_process and self.config.mtp_use_repeated_layer:
            share_z_loss(self.mtp, self.config.mtp_num_layers)
        self.trunk_gradient = TrunkGradient()
        self._pre_norm_hidden: Tensor | None = None
        if self.mtp_process and hidden_source == "pre_final_norm":
            self.decoder.final_layernorm.register_forward_pre_hook(self._keep_pre_norm_hidden)

    def _keep_pre_norm_hidden(self, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        main, self._pre_norm_hidden = self.trunk_gradient.branches(inputs[0])
        return main, *inputs[1:]

    def _postprocess(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None,
        rotary_pos_emb: Tensor | None,
        rotary_pos_cos: Tensor | None,
        rotary_pos_sin: Tensor | None,
        mtp_in_postprocess: bool | None = None,
        attention_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        packed_seq_params: Any = None,
        sequence_len_offset: Tensor | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
        output_processor: Callable[..., Any] | None = None,
        output_processor_context: Any = None,
        **unused: Any,
    ) -> Any:
        """Runs the MTP layers and, on the last stage, the output processor.

        Args:
            hidden_states: [s, b, h] from the decoder, or [(1+D) * s, b, h] from a standalone MTP stage; s is the
                per-rank length s/(cp * tp under sequence parallelism).
            output_processor_context: DepthInputs; the MTP stage reads `shifted_ids` from it.

        Returns:
            Off the last stage the hidden states of all depths so far, [(1+D) * s, b, h] or [s, b, h]. On the last
            stage output_processor(states, weight, context), with states [1+D, s, b, h] after their final norms.
        """
        if self.mtp_process:
            hidden_states = self._run_depths(
                hidden_states,
                input_ids=output_processor_context.shifted_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                rotary_pos_emb=rotary_pos_emb,
                rotary_pos_cos=rotary_pos_cos,
                rotary_pos_sin=rotary_pos_sin,
                packed_seq_params=packed_seq_params,
                sequence_len_offset=sequence_len_offset,
                padding_mask=padding_mask,
                embedding=self.embedding,
                **(extra_block_kwargs or {}),
            )
        if not self.post_process:
            return hidden_states
        num_states = 1 + (self.config.mtp_num_layers or 0)
        states = hidden_states.view(num_states, -1, *hidden_states.shape[1:])
        if output_processor is None:
            raise ValueError("the last stage of MTPModel needs an output_processor: the model owns no loss")
        return output_processor(states, self.head_weight(), output_processor_context)

    def _run_depths(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        main, source, self._pre_norm_hidden = hidden_states, self._pre_norm_hidden, None
        if source is None:
            main, source = self.trunk_gradient.branches(hidden_states)
        states = self.mtp(hidden_states=source, **kwargs)
        if main is source:
            return states
        # The first block of rows is what depth 1 read; the head of depth 0 reads the normed one, or its own branch.
        return torch.cat([main, states[main.shape[0] :]], dim=0)

    def head_weight(self) -> Tensor:
        """The output weight of this stage, [v_padded/tp, h]: its own, or the embedding when tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight
