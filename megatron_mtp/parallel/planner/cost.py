"""Estimates how long each part of a model takes on a known device: operations, bytes and messages against its rates.

A part's time is that of its matrix products, plus that of the memory traffic between them, plus that of the messages
that it waits for. A backward pass takes twice the products and traffic of a forward pass (attention 2.5 times, as its
kernels compute the scores again), and the messages once more; recomputation adds what is run again. A layer is never
faster than Python starts its kernels.
"""

from __future__ import annotations

from megatron_mtp.config.filled import filled
from megatron_mtp.config.machines import Machine
from megatron_mtp.parallel.flops import forward_flops_attention, forward_flops_logits
from megatron_mtp.parallel.params import Shards, layer_parameters, padded_vocab_size
from megatron_mtp.parallel.planner.assume import NOTHING, Assumptions
from megatron_mtp.parallel.planner.part_costs import PartCosts, PartTime
from megatron_mtp.parallel.planner.rates import Rates
from megatron_mtp.parallel.shape import RunShape

STEP_MS = 5.0
"""Once per step: batch, counts and logs."""
ATTENTION_BACKWARD = 2.5
"""Products of a backward pass through attention, for each of the forward pass."""


def estimate_costs(shape: RunShape, machine: Machine, assume: Assumptions = NOTHING) -> PartCosts:
    """Part times of a config with a known vocabulary size; the number of processes decides which messages leave a node.

    Raises:
        ConfigError: the device has no units for precision.dtype, or for FP8.
    """
    return _Estimate(shape, machine, assume).costs()


class _Estimate(Rates):
    def costs(self) -> PartCosts:
        model, links = self.model, self.links
        layers = {kind: self.layer(kind) for kind in dict.fromkeys(self.shape.layer_kinds)}
        norm = self.both(0.0, 4 * self.tokens * model.hidden_size * self.num_bytes / self.shards)
        is_frozen = model.mtp_freeze_trunk
        memory = self.machine.memory_gb_per_s * self.machine.memory_fraction
        return PartCosts(
            embedding=self.embedding(),
            layer={kind: _forward_only(time) if is_frozen else time for kind, time in layers.items()},
            final_norm=_forward_only(norm) if is_frozen else norm,
            mtp_layer=self.mtp_layer(),
            head=self.head(1 if is_frozen else 3),
            mtp_head=self.head(2 if model.mtp_detach_heads or is_frozen else 3),
            chunk=PartTime(self.machine.launch_ms, self.machine.launch_ms),
            step_ms=STEP_MS,
            # Zeroing (4), reading for the norm (4), the weight written in its dtype.
            update_ns_per_parameter=(8 + self.num_bytes) / memory,
            # Gradient read, master and two moments read and written.
            optimizer_ns_per_parameter=28 / memory,
            pipeline_link=links.pipeline,
            data_link=links.data,
            expert_data_link=links.expert_data if model.num_moe_experts else None,
        )

    def embedding(self) -> PartTime:
        model = self.model
        row_bytes = self.tokens * model.hidden_size * self.num_bytes
        time = self.both(0.0, 3 * row_bytes, self.links.collective(row_bytes), self.machine.launch_ms)
        return _forward_only(time) if model.mtp_freeze_trunk else time

    def layer(self, kind: str) -> PartTime:
        """A decoder layer, recomputation in its backward pass included."""
        is_moe = "moe" in kind
        time = self.attention("linear" in kind)
        if is_moe:
            messages = self.exchanges()
            own = time + self.experts()
            time = own + self.shown(messages, own)
        else:
            time = time + self.mlp(self.shape.dense_width(kind))
        share = self.recomputed_share
        time = time + PartTime(0.0, time.forward_ms * share if share else self.selective(kind))
        return self.not_faster_than_python(time, is_moe)

    @property
    def recomputed_share(self) -> float:
        """Share of fully recomputed layers; the first few of each chunk by `block` are averaged over all layers."""
        model = self.model
        if model.recompute_granularity != "full":
            return 0.0
        if model.recompute_method != "block":
            return 1.0
        chunks = model.pipeline_model_parallel_size * model.virtual_pipeline_model_parallel_size
        return min(1.0, filled(model.recompute_num_layers) * chunks / model.num_layers)

    def core_flops(self) -> float:
        """Scores and weighted values of full attention on one rank."""
        model, s = self.model, self.model.seq_length
        if model.multi_latent_attention:
            widths = model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim
        else:
            widths = 2 * model.kv_channels
        return self.tokens * s * model.num_attention_heads * widths / self.tp

    def core(self) -> float:
        """Milliseconds of a forward pass through them."""
        return self.core_flops() / (self.half_rate * self.machine.attention_fraction)

    def attention(self, is_linear: bool) -> PartTime:
        model = self.model
        total = self.tokens * forward_flops_attention(model, is_linear) / self.tp
        core, core_ms = (0.0, 0.0) if is_linear else (self.core_flops(), self.core())
        width = model.num_attention_heads * model.kv_channels / self.tp
        keys = 2 * model.kv_channels * model.num_query_groups / self.tp
        num_bytes = self.tokens * self.num_bytes * (6 * model.hidden_size / self.shards + 8 * width)
        messages = 2 * self.links.collective(self.gathered)
        cp = model.context_parallel_size
        if cp > 1:  # keys and values go around the ring; about half of it is hidden by the scores
            ring = self.links.within(self.tp * cp).ms(self.tokens * keys * self.num_bytes * (cp - 1))
            messages += 0.5 * ring
        side = min(
            model.hidden_size,
            model.num_attention_heads
            * (model.v_head_dim if model.multi_latent_attention else model.kv_channels)
            / self.tp,
        )
        time = self.both(self.linear(total - core, side), num_bytes, messages, self.machine.launch_ms)
        narrow = model.hidden_size / self.shards
        converted = self.quantized(self.tokens * (narrow + width), self.tokens * (narrow + width + keys))
        return time + PartTime(core_ms, ATTENTION_BACKWARD * core_ms) + converted

    def mlp(self, width: int) -> PartTime:
        model = self.model
        flops = 2 * model.hidden_size * width * self.matrices * self.tokens / self.tp
        num_bytes = self.tokens * self.num_bytes * (6 * model.hidden_size / self.shards + 3 * width / self.tp)
        messages = 2 * self.links.collective(self.gathered)
        time = self.both(
            self.linear(flops, min(model.hidden_size, width / self.tp)), num_bytes, messages, self.machine.launch_ms
        )
        narrow, inner = model.hidden_size / self.shards, width / self.tp
        outputs = narrow + (self.matrices - 1) * inner
        return time + self.quantized(self.tokens * (narrow + inner), self.tokens * outputs)

    @property
    def routed(self) -> float:
        """Tokens that this rank sends to experts, and on average receives; those above the capacity are dropped."""
        kept = min(1.0, self.model.moe_expert_capacity_factor or 1.0)
        return self.tokens * self.model.moe_router_topk / self.tp * kept

    def experts(self) -> PartTime:
        """Routed experts: products or weights' traffic, whichever takes longer; permutation; and the shared expert. The
        exchanges are not counted.

        Without grouped products the products of local experts run one after another, each as narrow as its tokens are
        few. torch's grouped product reads a copy of all weights that is made for it.
        """
        model, machine = self.model, self.machine
        routed, width = self.routed * self.assume.busiest_rank, filled(model.moe_ffn_hidden_size)
        flops = 2 * model.hidden_size * width * self.matrices * routed
        held = layer_parameters(model, Shards.of(model), True).expert * self.num_bytes
        weights = self.traffic(held)
        side, launch = float(min(model.hidden_size, width)), 2 * machine.launch_ms
        if not self.is_grouped:
            local = filled(model.num_moe_experts) / model.expert_model_parallel_size
            side = min(side, max(1.0, routed * self.shape.grid.expert_tp / local))
            launch += local * machine.launch_ms
        compute = max(self.linear(flops, side, is_grouped=self.is_grouped), weights)
        num_bytes = routed * self.num_bytes * (8 * model.hidden_size + 3 * width)
        num_bytes += self.tokens / self.shards * self.num_bytes * 6 * model.hidden_size
        if self.is_grouped and not self.uses_te:
            num_bytes += 2 * held
        time = self.both(compute, num_bytes, 0.0, launch)
        outputs = model.hidden_size + (self.matrices - 1) * width
        time = time + self.quantized(routed * (model.hidden_size + width), routed * outputs)
        if model.moe_shared_expert_intermediate_size:
            time = time + self.mlp(model.moe_shared_expert_intermediate_size)
        return time

    def exchanges(self) -> float:
        """Milliseconds of the two exchanges of a forward pass."""
        return 2 * self.links.exchange(self.routed, self.num_bytes)

    def shown(self, messages_ms: float, layer: PartTime) -> PartTime:
        """What is left of the exchanges once the layer of another micro-batch has hidden what it can."""
        if not self.assume.overlap_experts:
            return PartTime(messages_ms, messages_ms)
        least = self.machine.overlapped_share * messages_ms
        both = max(2 * least, 2 * messages_ms - layer.total_ms)
        return PartTime(both / 2, both / 2)

    def selective(self, kind: str) -> float:
        """Milliseconds that recomputing chosen modules adds to a layer's backward pass."""
        model = self.model
        if model.recompute_granularity != "selective":
            return 0.0
        is_moe, modules = "moe" in kind, set(model.recompute_modules or [])
        extra = self.core() if "core_attn" in modules and "linear" not in kind else 0.0
        if "mla_up_proj" in modules:
            width = model.num_attention_heads * (2 * model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim)
            rank = max(model.kv_lora_rank, model.q_lora_rank or 0)
            extra += self.linear(2 * rank * width * self.tokens / self.tp, rank)
        if "layernorm" in modules:
            extra += self.traffic(8 * self.tokens * model.hidden_size * self.num_bytes / self.shards)
        if is_moe and "moe" in modules:
            extra += self.experts().forward_ms + self.exchanges()
        elif is_moe:
            if "moe_act" in modules:
                extra += self.traffic(3 * self.routed * filled(model.moe_ffn_hidden_size) * self.num_bytes)
            if "shared_experts" in modules and model.moe_shared_expert_intermediate_size:
                extra += self.mlp(model.moe_shared_expert_intermediate_size).forward_ms
        elif "mlp" in modules:
            extra += self.mlp(self.shape.dense_width(kind)).forward_ms
        return extra

    def mtp_layer(self) -> PartTime:
        """Lookup, norms and projection, then a transformer layer, then a norm."""
        model, layer = self.model, self.layer(self.shape.mtp_kind)
        if model.mtp_variant == "parallel":
            is_rerun = self.shape.depths.count > 1 and model.recompute_granularity != "full"
            return layer + PartTime(0.0, layer.forward_ms * is_rerun)
        h = model.hidden_size
        num_bytes = 12 * self.tokens * h * self.num_bytes / self.shards
        gathered = 2 * self.links.collective(self.gathered)
        joint = self.both(
            self.linear(2 * self.tokens * 2 * h * h / self.tp, h / self.tp), num_bytes, gathered, self.machine.launch_ms
        )
        if model.recompute_granularity == "full":
            joint = joint + PartTime(0.0, joint.forward_ms)
        return self.embedding() + joint + layer

    def head(self, products: int) -> PartTime:
        """Logits, loss and gradients, all in the forward pass, for a part of the tokens at a time.

        Args:
            products: 1 for the logits, 1 each for the gradients of hidden states and weight.
        """
        model = self.model
        flops = forward_flops_logits(model) * self.tokens / self.tp
        product = flops * (1 + self.machine.narrow_width / model.hidden_size)  # never in FP8
        product /= self.half_rate * self.machine.matmul_fraction
        passes = self.traffic(6 * 4 * self.tokens * padded_vocab_size(model) / self.tp)  # fp32 logits, six passes
        gather = self.links.collective(self.tokens * model.hidden_size * self.num_bytes)
        return PartTime(products * product + passes + gather, gather if products > 1 else 0.0)


def _forward_only(time: PartTime) -> PartTime:
    return PartTime(time.forward_ms, 0.0)


def layer_times(costs: PartCosts, shape: RunShape) -> list[PartTime]:
    """Time of every decoder layer."""
    return [costs.time_of(kind) for kind in shape.layer_kinds]
