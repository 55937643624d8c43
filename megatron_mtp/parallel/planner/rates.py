"""How long products, memory traffic and Python take on a device: what the estimates of parts are made of."""

from __future__ import annotations

from megatron_mtp.config.machines import Machine
from megatron_mtp.parallel.planner.assume import Assumptions
from megatron_mtp.parallel.planner.links import Links
from megatron_mtp.parallel.planner.part_costs import ZERO, PartTime
from megatron_mtp.parallel.shape import RunShape, has_grouped_experts


class Rates:
    """Rates of one config on one device.

    Raises:
        ConfigError: the device has no units for precision.dtype, or for FP8.
    """

    def __init__(self, shape: RunShape, machine: Machine, assume: Assumptions):
        self.shape, self.machine, self.assume, self.model = shape, machine, assume, shape.cfg.model
        self.num_bytes, self.tokens, self.shards = shape.item_bytes, shape.tokens, shape.hidden_shards
        self.tp, self.matrices = self.model.tensor_model_parallel_size, 3 if self.model.gated_linear_unit else 2
        self.links = Links(shape, machine, assume)
        self.half_rate = machine.peak_flops_per_ms(shape.cfg.precision.dtype)
        self.is_fp8 = assume.recipe is not None
        self.fp8_rate = machine.fp8_flops_per_ms(assume.fp8) * assume.recipe.speed if assume.recipe else self.half_rate
        self.gathered = self.tokens * self.model.hidden_size * (1 if self.is_fp8 else self.num_bytes)

    def linear(self, flops: float, width: float, *, is_grouped: bool = False) -> float:
        """Milliseconds of matrix products of linear layers, or grouped ones of experts.

        Args:
            width: the smaller side of the matrix; narrow ones are slower.
        """
        machine = self.machine
        if self.is_fp8:
            fraction = machine.fp8_expert_fraction if is_grouped else machine.fp8_fraction
        else:
            fraction = machine.expert_fraction if is_grouped else machine.matmul_fraction
        return flops * (1 + machine.narrow_width / width) / (self.fp8_rate * fraction)

    def traffic(self, num_bytes: float) -> float:
        """Milliseconds of memory traffic."""
        return num_bytes / (self.machine.memory_gb_per_s * self.machine.memory_fraction * 1e6)

    def quantized(self, inputs: float, outputs: float) -> PartTime:
        """Converting numbers to FP8: inputs of products forward, gradients of their outputs backward."""
        if self.assume.recipe is None:
            return ZERO
        each = self.assume.recipe.quantize_bytes
        return PartTime(self.traffic(inputs * each), self.traffic(outputs * each))

    def both(self, compute_ms: float, num_bytes: float, messages_ms: float = 0.0, launch_ms: float = 0.0) -> PartTime:
        """A part's time from that of its forward pass."""
        forward = compute_ms + self.traffic(num_bytes)
        return PartTime(forward + messages_ms + launch_ms, 2 * forward + messages_ms + launch_ms)

    def not_faster_than_python(self, time: PartTime, is_moe: bool) -> PartTime:
        """A layer on a device that may have to wait for Python; where both take as long, each waits at times."""
        machine, graphs = self.machine, self.assume.graphs
        if not machine.host_ms or graphs == "all":
            return time
        host = machine.host_ms * (machine.host_fp8_factor if self.is_fp8 else 1.0)
        if is_moe:
            host *= machine.host_expert_factor
            host *= machine.host_overlap_factor if self.assume.overlap_experts else 1.0
        if graphs == "attention":
            host *= machine.host_graph_share
        return PartTime(_slower(time.forward_ms, host), _slower(time.backward_ms, host))

    @property
    def is_grouped(self) -> bool:
        """Whether all local experts share one grouped product."""
        return has_grouped_experts(self.model, use_te=self.uses_te, is_cpu=self.machine.is_cpu)

    @property
    def uses_te(self) -> bool:
        """Whether the modules are assumed to be Transformer Engine's."""
        return not (self.machine.is_cpu or self.model.backend == "torch")


def _slower(device_ms: float, host_ms: float) -> float:
    return float((device_ms**4 + host_ms**4) ** 0.25)
