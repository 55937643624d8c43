"""Bytes that autograd keeps of each part of a model between its forward and its backward pass. Pure arithmetic.

All sizes are bytes of one micro-batch on one rank. They were counted tensor by tensor on the torch backend (hooks on
saved tensors, fp32 and bf16). Transformer Engine was never run: its fused activation is assumed to keep one tensor less
of each kind, and in FP8 the inputs of its products in FP8.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from megatron_mtp.config.filled import filled
from megatron_mtp.parallel.planner.assume import NOTHING, Assumptions
from megatron_mtp.parallel.shape import RunShape, has_grouped_experts

ROUTER_BYTES = 22
"""For each token and expert: scores, maps, indices."""


class Activations:
    """Bytes that the parts of a finalized config keep. Kinds of layers: see `RunShape.layer_kinds`.

    Args:
        is_cpu: torch's CPU norms keep two fp32 copies of their input; a GPU's keep the input.
    """

    def __init__(self, shape: RunShape, is_cpu: bool, assume: Assumptions = NOTHING):
        self.shape, self.model, self.is_cpu = shape, shape.cfg.model, is_cpu
        self.uses_te = not is_cpu and self.model.backend != "torch"
        # Transformer Engine keeps the inputs of FP8 products in FP8.
        self.input_item = assume.recipe.kept_bytes if assume.recipe else float(shape.item_bytes)
        self.item, self.tokens, self.stream = shape.item_bytes, shape.tokens, shape.hidden_bytes
        # A search asks for the same few layers thousands of times.
        self.layer, self.complete_layer = cache(self._layer), cache(self._complete_layer)
        self._gradients = cache(self._layer_gradients)

    def norm(self, stream: float, output_item: float | None = None) -> float:
        """A norm over a tensor of `stream` bytes, and its output, which the next product keeps.

        Args:
            output_item: bytes of each number of the output; None: as the input.
        """
        if self.is_cpu:
            return stream + 8 * stream / self.item
        return stream + stream / self.item * (output_item or self.item)

    def attention(self, is_linear: bool) -> float:
        """The attention block with the norm before it."""
        model, tp = self.model, self.model.tensor_model_parallel_size
        before = self.norm(self.stream, self.input_item)
        if is_linear:
            return before + self._linear_attention()
        tables = 4 * model.seq_length / model.context_parallel_size * self.item
        if model.multi_latent_attention:
            return (
                before + self._latent_attention() + tables * model.qk_pos_emb_head_dim + self._copies(model.v_head_dim)
            )
        queries, keys = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
        kept = queries * (2 if model.attention_output_gate else 1) + 2 * keys  # the product's output
        kept += 2 * queries + keys  # rotated queries and keys, and the result
        per_token = kept * self.item + 4 * model.num_attention_heads
        if model.qk_layernorm:
            copies = (4 if self.item == 4 else 8) if self.is_cpu else 0
            per_token += copies * (queries + keys)
        rotates = model.position_embedding_type == "rope"
        kept_tables = tables * model.kv_channels * rotates
        return before + self.tokens * per_token / tp + kept_tables + self._copies(model.kv_channels)

    def _copies(self, head: int) -> float:
        """Attention's result in FP8, beside the one that attention itself keeps."""
        if self.input_item == self.item:
            return 0.0
        return (
            self.tokens
            * self.model.num_attention_heads
            * head
            * self.input_item
            / self.model.tensor_model_parallel_size
        )

    def _latent_attention(self) -> float:
        model, tp = self.model, self.model.tensor_model_parallel_size
        heads = model.num_attention_heads
        head = model.qk_head_dim + model.qk_pos_emb_head_dim
        latents = model.kv_lora_rank + (model.q_lora_rank or 0)
        norm = (8 if self.is_cpu else self.item) * model.qk_layernorm
        per_token = latents * (self.item + norm) + model.qk_pos_emb_head_dim * self.item
        values = model.v_head_dim if self.uses_te else head  # the torch backend pads values to the width of keys
        kept = 2 * head + 2 * values + (0 if self.uses_te else model.v_head_dim)
        return self.tokens * (per_token + heads * (kept * self.item + 4) / tp)

    def _linear_attention(self) -> float:
        model = self.model
        keys = model.linear_num_key_heads * model.linear_key_head_dim
        values = model.linear_num_value_heads * model.linear_value_head_dim
        return self.tokens * self.item * (8 * keys + 10 * values) / model.tensor_model_parallel_size

    def feed_forward(self, kind: str) -> float:
        """The feed-forward block with the norm before it."""
        if "moe" in kind:
            return self.norm(self.stream) + self.experts()
        inner = self._inner(self.shape.dense_width(kind), self.tokens, self.model.tensor_model_parallel_size)
        return self.norm(self.stream, self.input_item) + inner

    def _inner(self, width: int, tokens: float, shards: int, extra: int = 0) -> float:
        """What a feed-forward block keeps between its two products."""
        widths = (3 if self.uses_te else 5) if self.model.gated_linear_unit else 2
        saved = self.item - self.input_item  # the last of them is the input of the second product
        return tokens * width * ((widths + extra) * self.item - saved) / shards

    def experts(self) -> float:
        """Routed tokens, assumed to be spread evenly over experts, and the shared expert."""
        model = self.model
        tp, etp = model.tensor_model_parallel_size, self.shape.grid.expert_tp
        routed = self.tokens * model.moe_router_topk * etp / tp
        kept = routed * (model.hidden_size * self.input_item + 20)
        kept += self._inner(filled(model.moe_ffn_hidden_size), routed, etp, extra=1)
        kept += self.tokens / tp * ROUTER_BYTES * filled(model.num_moe_experts)
        if model.moe_shared_expert_intermediate_size:
            kept += self._inner(model.moe_shared_expert_intermediate_size, self.tokens, tp)
        return kept

    def _layer(self, kind: str) -> float:
        """A decoder layer as it is run: fully recomputed, in part, or not at all."""
        if self.model.recompute_granularity == "full":
            return self.stream
        return self.complete_layer(kind) - self._dropped(kind)

    def _complete_layer(self, kind: str) -> float:
        """A decoder layer without recomputation."""
        return self.attention("linear" in kind) + self.feed_forward(kind)

    def _dropped(self, kind: str) -> float:
        """What selective recomputation does not keep."""
        model = self.model
        if model.recompute_granularity != "selective":
            return 0.0
        modules, is_moe, tp = set(model.recompute_modules or []), "moe" in kind, model.tensor_model_parallel_size
        dropped = 2 * self.stream / self.item * self.input_item if "layernorm" in modules else 0.0
        if "mla_up_proj" in modules:
            head = 2 * (model.qk_head_dim + model.qk_pos_emb_head_dim) + model.v_head_dim
            dropped += self.tokens * model.num_attention_heads * head * self.item / tp
        if is_moe and "moe" in modules:
            return dropped + self.experts() - self.stream
        if is_moe and "moe_act" in modules:
            routed = self.tokens * model.moe_router_topk / tp
            dropped += routed * filled(model.moe_ffn_hidden_size) * self.input_item
        if is_moe and "shared_experts" in modules and model.moe_shared_expert_intermediate_size:
            dropped += self._inner(model.moe_shared_expert_intermediate_size, self.tokens, tp)
        if not is_moe and "mlp" in modules:
            dropped += self._inner(self.shape.dense_width(kind), self.tokens, tp)
        return dropped

    def mtp_layer(self) -> float:
        """One depth: two norms, the concatenated input of the projection, a layer, a norm."""
        model, kind = self.model, self.shape.mtp_kind
        after = self.norm(self.stream) - self.stream
        if model.mtp_variant == "parallel":
            return after + (self.stream if self.shape.depths.count > 1 else self.layer(kind))
        if model.recompute_granularity == "full":
            return 3 * self.stream
        before = 2 * (self.norm(self.stream) - self.stream)
        return before + 2 * self.stream + self.layer(kind) + after

    def head(self, num_states: int) -> float:
        """The gradient of `num_states` depths' hidden states, gathered over TP; for each token targets and losses."""
        return num_states * self.tokens * (self.model.hidden_size * self.item + 24)

    def chunk(self, symbols: str, kinds: Sequence[str]) -> float:
        """A chunk of `symbols`, such as "Ettt", with decoder layers of `kinds`."""
        depths, is_full = symbols.count("m"), self.model.recompute_granularity == "full"
        total = self._recomputed_layers(kinds) if is_full else sum(self.layer(kind) for kind in kinds)
        if "E" not in symbols and (is_full or (self.is_cpu and self.item < 4) or not kinds):
            total += self.stream  # the received state, if no norm keeps it
        if depths or ("L" in symbols and not self.shape.depths.count):
            total += self.norm(self.stream) - self.stream  # final norm
        total += depths * self.mtp_layer()
        if "L" in symbols:
            total += self.head(1 + self.shape.depths.count)
        elif self.is_cpu:  # on GPUs an output is freed once it is sent
            total += self.stream * (1 + depths)
        return total

    def _recomputed_layers(self, kinds: Sequence[str]) -> float:
        """uniform: the input of each group of layers. block: the input of each of the first layers; the others keep
        everything."""
        model, count = self.model, filled(self.model.recompute_num_layers)
        if model.recompute_method == "block":
            return min(count, len(kinds)) * self.stream + sum(self.complete_layer(kind) for kind in kinds[count:])
        return -(-len(kinds) // count) * self.stream

    def transient(self, symbols: str, kinds: Sequence[str]) -> float:
        """The most that a call of this chunk needs temporarily, in addition to what is kept."""
        model, tp = self.model, self.model.tensor_model_parallel_size
        widest = max((self._gradients(kind) for kind in set(kinds)), default=0.0)
        if "m" in symbols:
            widest = max(widest, self._gradients(self.shape.mtp_kind))
        if model.recompute_granularity == "full" and (kinds or "m" in symbols):
            group = filled(model.recompute_num_layers) if model.recompute_method == "uniform" else 1
            most = max(self.complete_layer(kind) for kind in kinds or [self.shape.mtp_kind])
            widest += most * min(group, max(1, len(kinds)))
        if "L" not in symbols:
            return widest
        rows = -(-(model.vocab_size or 0) // tp)
        states = (1 + self.shape.depths.count) * self.tokens
        logits = min(self.shape.logits_chunk_tokens, states) * rows * self.shape.logit_bytes
        weight = rows * model.hidden_size * (4 if self.item == 4 else 4 + self.item)
        return max(widest, logits + weight + states * model.hidden_size * self.item)

    @property
    def _joint_experts(self) -> float:
        """Experts whose weights are held at once beside the parameters: torch's grouped product reads a copy of all and
        makes all gradients."""
        model = self.model
        if self.uses_te or not has_grouped_experts(model, use_te=False, is_cpu=self.is_cpu):
            return 1.0
        return 2.0 * filled(model.num_moe_experts) / model.expert_model_parallel_size

    def _layer_gradients(self, kind: str) -> float:
        """Gradients that live at once in a layer's backward pass: of the residual stream, and of the widest product."""
        model, tp = self.model, self.model.tensor_model_parallel_size
        inner = self.tokens * self.shape.dense_width(kind) / tp
        weight = model.hidden_size * self.shape.dense_width(kind) / tp
        if "moe" in kind:
            etp, width = self.shape.grid.expert_tp, filled(model.moe_ffn_hidden_size)
            inner = self.tokens * model.moe_router_topk * (width + model.hidden_size * etp) / tp
            weight = model.hidden_size * max(
                width / etp * self._joint_experts, (model.moe_shared_expert_intermediate_size or 0) / tp
            )
        factor = 4 if model.gated_linear_unit else 2
        return 3 * self.stream + (factor * inner + (2 if model.gated_linear_unit else 1) * weight) * self.item
