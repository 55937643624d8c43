"""Which links the groups of a job use, and how long their messages take.

Megatron places the ranks of a group at equal distances (`parallel/grid.py`). Groups that stay within a node use its
links, others the network. A ring over several nodes has one port of the network for each of its ranks in a node, so
data-parallel groups of neighbouring ranks are faster than those whose ranks are all on different nodes.
"""

from __future__ import annotations

from megatron_mtp.config.machines import Machine
from megatron_mtp.parallel.planner.assume import Assumptions
from megatron_mtp.parallel.planner.part_costs import Link
from megatron_mtp.parallel.shape import RunShape


class Links:
    """Links of the groups of one job."""

    def __init__(self, shape: RunShape, machine: Machine, assume: Assumptions):
        self.shape, self.machine, self.assume, self.model = shape, machine, assume, shape.cfg.model

    def within(self, span: int) -> Link:
        """The slowest link between ranks of a group that spans `span` neighbouring ranks."""
        machine = self.machine
        is_near = span <= machine.node_size
        speed = machine.node_gb_per_s if is_near else machine.network_gb_per_s
        latency = machine.node_latency_ms if is_near else machine.network_latency_ms
        return Link(latency_ms=latency, gb_per_s=speed * machine.link_fraction)

    def ring(self, size: int, distance: int) -> Link:
        """A ring over `size` ranks that are `distance` ranks apart."""
        machine = self.machine
        if size * distance <= machine.node_size:
            return self.within(1)
        ports = max(1, min(size, machine.node_size // distance))
        speed = min(machine.node_gb_per_s, ports * machine.network_gb_per_s)
        return Link(latency_ms=machine.network_latency_ms, gb_per_s=speed * machine.link_fraction)

    @property
    def pipeline(self) -> Link:
        """Between neighbouring stages."""
        grid = self.shape.grid
        distance = grid.tp * grid.cp if grid.pp_before_dp else grid.world_size // grid.pp
        return self.within(distance * grid.pp)

    @property
    def data(self) -> Link:
        """A ring over data-parallel ranks, those of context parallelism included."""
        grid = self.shape.grid
        if grid.pp_before_dp and grid.cp == 1:
            return self.ring(grid.dp_size, grid.tp * grid.pp)
        if grid.pp_before_dp:  # context-parallel ranks are neighbours, replicas are apart: the longest stretch decides
            return self.within(grid.world_size)
        return self.ring(grid.dp_size * grid.cp, grid.tp)

    @property
    def expert_data(self) -> Link:
        """A ring over the replicas of an expert."""
        grid = self.shape.grid
        distance = grid.expert_tp * grid.ep * (grid.pp if grid.pp_before_dp else 1)
        return self.ring(grid.expert_dp_size, distance)

    def collective(self, num_bytes: float) -> float:
        """Milliseconds of an all-gather or reduce-scatter over the tensor-parallel group that nothing hides."""
        tp = self.model.tensor_model_parallel_size
        if tp == 1:
            return 0.0
        shown = self.machine.overlapped_share if self.assume.overlap_tensor else 1.0
        return shown * self.within(tp).ms(num_bytes * (tp - 1) / tp)

    def exchange(self, routed: float, item_bytes: float) -> float:
        """Milliseconds of one exchange of `routed` tokens over the expert-parallel group: the slower of what stays in
        the node and what leaves it."""
        model, machine = self.model, self.machine
        ep = model.expert_model_parallel_size
        if ep == 1:
            return 0.0
        span = ep * self.shape.grid.expert_tp
        inside = min(span, machine.node_size)
        row = model.hidden_size * item_bytes * self.assume.busiest_rank
        arrives = inside if self.assume.dispatch == "deduplicated" else span  # what reaches the node is spread in it
        near = self.within(1).ms(routed * row * (inside - 1) / arrives)
        if span <= machine.node_size:
            return near
        copies = self.copies_per_token(span // inside)
        return max(near, self.within(span).ms(routed / model.moe_router_topk * copies * row))

    def copies_per_token(self, nodes: int) -> float:
        """Messages over the network for each token whose experts are on `nodes` nodes.

        With one message for each node that has some of its experts, the expected number is that of distinct nodes among
        random ones. Group-limited routing allows `moe_router_group_topk` of the groups, each of which is on as many
        nodes as its experts are.
        """
        model = self.model
        topk, away = model.moe_router_topk, (nodes - 1) / nodes
        if self.assume.dispatch == "alltoall":
            return topk * away
        reached = nodes
        if model.moe_router_num_groups and model.moe_router_group_topk:
            share = model.moe_router_group_topk / model.moe_router_num_groups
            reached = min(nodes, max(1, round(nodes * share)))
        return float(reached * (1 - (1 - 1 / reached) ** topk) * away)
