"""Estimates how long each part of a model takes on a known device: operations, bytes and messages against its rates.

A part's time is that of its matrix products, plus that of the memory traffic between them, plus that of the messages
that it waits for. A backward pass takes twice the products and traffic of a forward pass, and the messages once more;
recomputation adds what is run again. Absolute times can be off by some tens of percent. The choice of a split depends
on their proportions only.
"""

from __future__ import annotations

from megatron_mtp.config.filled import filled
from megatron_mtp.config.machines import Machine
from megatron_mtp.parallel.flops import forward_flops_attention, forward_flops_logits
from megatron_mtp.parallel.params import Shards, layer_parameters, padded_vocab_size
from megatron_mtp.parallel.planner.part_costs import Link, PartCosts, PartTime
from megatron_mtp.parallel.shape import RunShape

STEP_MS = 5.0
"""Once per step: batch, counts and logs."""


def estimate_costs(shape: RunShape, machine: Machine) -> PartCosts:
    """Part times of a config with a known vocabulary size; the number of processes decides which messages leave a node.

    Raises:
        PlanError: the device has no units for precision.dtype.
    """
    return _Estimate(shape, machine).costs()


class _Estimate:
    def __init__(self, shape: RunShape, machine: Machine):
        self.shape, self.machine, self.model = shape, machine, shape.cfg.model
        self.num_bytes, self.tokens, self.shards = shape.item_bytes, shape.tokens, shape.hidden_shards
        self.tp, self.matrices = self.model.tensor_model_parallel_size, 3 if self.model.gated_linear_unit else 2

    def costs(self) -> PartCosts:
        model = self.model
        layers = {kind: self.layer(kind) for kind in dict.fromkeys([*self.shape.layer_kinds, self.shape.mtp_kind])}
        norm = self.both(0.0, 4 * self.tokens * model.hidden_size * self.num_bytes / self.shards)
        is_frozen = model.mtp_freeze_trunk
        memory = self.machine.memory_gb_per_s * self.machine.memory_fraction
        return PartCosts(
            embedding=self.embedding(),
            layer={kind: _forward_only(time) if is_frozen else time for kind, time in layers.items()},
            final_norm=_forward_only(norm) if is_frozen else norm,
            mtp_layer=self.mtp_layer(layers),
            head=self.head(1 if is_frozen else 3),
            mtp_head=self.head(2 if model.mtp_detach_heads or is_frozen else 3),
            chunk=PartTime(self.machine.launch_ms, self.machine.launch_ms),
            step_ms=STEP_MS,
            # Zeroing (4), reading for the norm (4), the weight written in its dtype.
            update_ns_per_parameter=(8 + self.num_bytes) / memory,
            # Gradient read, master and two moments read and written.
            optimizer_ns_per_parameter=28 / memory,
            pipeline_link=self.link(self.shape.world_size),
            data_link=self.link(self.shape.world_size // model.pipeline_model_parallel_size),
        )

    def link(self, span: int) -> Link:
        """The slowest link between ranks of a group that spans `span` neighbouring ranks."""
        machine = self.machine
        if span <= machine.node_size:
            return Link(latency_ms=machine.node_latency_ms, gb_per_s=machine.node_gb_per_s * machine.memory_fraction)
        return Link(latency_ms=machine.network_latency_ms, gb_per_s=machine.network_gb_per_s * machine.memory_fraction)

    def compute(self, flops: float, fraction: float) -> float:
        """Milliseconds of matrix products."""
        return flops / (self.machine.peak_flops_per_ms(self.shape.cfg.precision.dtype) * fraction)

    def traffic(self, num_bytes: float) -> float:
        """Milliseconds of memory traffic."""
        return num_bytes / (self.machine.memory_gb_per_s * self.machine.memory_fraction * 1e6)

    def both(self, compute_ms: float, num_bytes: float, messages_ms: float = 0.0, launch_ms: float = 0.0) -> PartTime:
        """A part's time from that of its forward pass."""
        forward = compute_ms + self.traffic(num_bytes)
        return PartTime(forward + messages_ms + launch_ms, 2 * forward + messages_ms + launch_ms)

    def embedding(self) -> PartTime:
        model = self.model
        row_bytes = self.tokens * model.hidden_size * self.num_bytes
        time = self.both(0.0, 3 * row_bytes, self.collective(row_bytes), self.machine.launch_ms)
        return _forward_only(time) if model.mtp_freeze_trunk else time

    def collective(self, num_bytes: float) -> float:
        """An all-gather or reduce-scatter over the tensor-parallel group."""
        if self.tp == 1:
            return 0.0
        return self.link(self.tp).ms(num_bytes * (self.tp - 1) / self.tp)

    def layer(self, kind: str) -> PartTime:
        """A decoder layer, recomputation in its backward pass included."""
        block = self.experts() if "moe" in kind else self.mlp(self.model.ffn_hidden_size)
        time = self.attention("linear" in kind) + block
        share = self.recomputed_share
        return time + PartTime(0.0, time.forward_ms * share if share else self.selective(kind))

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

    def attention(self, is_linear: bool) -> PartTime:
        model, machine = self.model, self.machine
        total = self.tokens * forward_flops_attention(model, is_linear) / self.tp
        core = 0.0 if is_linear else self.core_flops()
        compute = self.compute(total - core, machine.matmul_fraction) + self.compute(core, machine.attention_fraction)
        width = model.num_attention_heads * model.kv_channels * 4 / self.tp
        num_bytes = self.tokens * self.num_bytes * (6 * model.hidden_size / self.shards + 2 * width)
        messages = 2 * self.collective(self.tokens * model.hidden_size * self.num_bytes)
        cp = model.context_parallel_size
        if cp > 1:  # keys and values go around the ring; about half of it is hidden by the scores
            keys = 2 * model.kv_channels * model.num_query_groups / self.tp
            messages += 0.5 * self.link(self.tp * cp).ms(self.tokens * keys * self.num_bytes * (cp - 1))
        return self.both(compute, num_bytes, messages, machine.launch_ms)

    def mlp(self, width: int) -> PartTime:
        model = self.model
        flops = 2 * model.hidden_size * width * self.matrices * self.tokens / self.tp
        num_bytes = self.tokens * self.num_bytes * (6 * model.hidden_size / self.shards + 3 * width / self.tp)
        messages = 2 * self.collective(self.tokens * model.hidden_size * self.num_bytes)
        return self.both(self.compute(flops, self.machine.matmul_fraction), num_bytes, messages, self.machine.launch_ms)

    def experts(self) -> PartTime:
        """Routed experts: products or weights' traffic, whichever takes longer; permutation; two exchanges over the
        expert-parallel group; and the shared expert."""
        model, machine = self.model, self.machine
        routed, width = self.tokens * model.moe_router_topk / self.tp, filled(model.moe_ffn_hidden_size)
        flops = 2 * model.hidden_size * width * self.matrices * routed
        weights = self.traffic(layer_parameters(model, Shards.of(model), True).expert * self.num_bytes)
        compute = max(self.compute(flops, machine.expert_fraction), weights)
        num_bytes = routed * self.num_bytes * (8 * model.hidden_size + 3 * width)
        num_bytes += self.tokens / self.shards * self.num_bytes * 6 * model.hidden_size
        time = self.both(compute, num_bytes, 2 * self.all_to_all(routed), 2 * machine.launch_ms)
        if model.moe_shared_expert_intermediate_size:
            time = time + self.mlp(model.moe_shared_expert_intermediate_size)
        return time

    def all_to_all(self, routed: float) -> float:
        """One exchange of the routed tokens: the slower of what stays in the node and what leaves it."""
        model, machine = self.model, self.machine
        ep = model.expert_model_parallel_size
        if ep == 1:
            return 0.0
        span = ep * self.shape.grid.expert_tp
        inside = min(span, machine.node_size)
        num_bytes = routed * model.hidden_size * self.num_bytes
        near = self.link(1).ms(num_bytes * (inside - 1) / span)
        return near if span <= machine.node_size else max(near, self.link(span).ms(num_bytes * (span - inside) / span))

    def selective(self, kind: str) -> float:
        """Milliseconds that recomputing chosen modules adds to a layer's backward pass."""
        model, machine = self.model, self.machine
        if model.recompute_granularity != "selective":
            return 0.0
        is_moe, modules = "moe" in kind, set(model.recompute_modules or [])
        extra = 0.0
        if "core_attn" in modules and "linear" not in kind:
            extra += self.compute(self.core_flops(), machine.attention_fraction)
        if "mla_up_proj" in modules:
            width = model.num_attention_heads * (2 * model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim)
            rank = max(model.kv_lora_rank, model.q_lora_rank or 0)
            extra += self.compute(2 * rank * width * self.tokens / self.tp, machine.matmul_fraction)
        if "layernorm" in modules:
            extra += self.traffic(8 * self.tokens * model.hidden_size * self.num_bytes / self.shards)
        if is_moe and "moe" in modules:
            extra += self.experts().forward_ms
        elif is_moe:
            if "moe_act" in modules:
                routed = self.tokens * model.moe_router_topk / self.tp
                extra += self.traffic(3 * routed * filled(model.moe_ffn_hidden_size) * self.num_bytes)
            if "shared_experts" in modules and model.moe_shared_expert_intermediate_size:
                extra += self.mlp(model.moe_shared_expert_intermediate_size).forward_ms
        elif "mlp" in modules:
            extra += self.mlp(model.ffn_hidden_size).forward_ms
        return extra

    def mtp_layer(self, layers: dict[str, PartTime]) -> PartTime:
        """Lookup, norms and projection, then a layer of the last decoder layer's kind, then a norm."""
        model, layer = self.model, layers[self.shape.mtp_kind]
        if model.mtp_variant == "parallel":
            is_rerun = self.shape.depths.count > 1 and model.recompute_granularity != "full"
            return layer + PartTime(0.0, layer.forward_ms * is_rerun)
        h, machine = model.hidden_size, self.machine
        products = self.compute(2 * self.tokens * 2 * h * h / self.tp, machine.matmul_fraction)
        num_bytes = 12 * self.tokens * h * self.num_bytes / self.shards
        gathered = 2 * self.collective(self.tokens * h * self.num_bytes)
        joint = self.both(products, num_bytes, gathered, machine.launch_ms)
        if model.recompute_granularity == "full":
            joint = joint + PartTime(0.0, joint.forward_ms)
        return self.embedding() + joint + layer

    def head(self, products: int) -> PartTime:
        """Logits, loss and gradients, all in the forward pass, for a part of the tokens at a time.

        Args:
            products: 1 for the logits, 1 each for the gradients of hidden states and weight.
        """
        model = self.model
        product = self.compute(forward_flops_logits(model) * self.tokens / self.tp, self.machine.matmul_fraction)
        passes = self.traffic(6 * 4 * self.tokens * padded_vocab_size(model) / self.tp)  # fp32 logits, six passes
        gather = self.collective(self.tokens * model.hidden_size * self.num_bytes)
        return PartTime(products * product + passes + gather, gather if products > 1 else 0.0)


def _forward_only(time: PartTime) -> PartTime:
    return PartTime(time.forward_ms, 0.0)


def layer_times(costs: PartCosts, shape: RunShape) -> list[PartTime]:
    """Time of every decoder layer."""
    return [costs.time_of(kind) for kind in shape.layer_kinds]
