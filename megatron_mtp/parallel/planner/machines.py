"""What known devices can do, for estimates before anything was measured.

Peaks are those of hardware.py. Fractions of the peak are what large matrix products, attention and grouped expert products
reach in practice; they are estimates, the same for all devices, and `megatron-mtp profile` replaces them by measurements.

Sources: NVIDIA and AMD data sheets: memory size and bandwidth, links in one direction for each device; the network is one
400 Gbit/s port for each device (200 for A100, 100 for PCIe cards).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from megatron_mtp.errors import PlanError
from megatron_mtp.parallel.planner.hardware import Dtype, dense_peak_tflops


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One kind of device and what connects it.

    Args:
        device_name: as hardware.py knows it.
        memory_gib: of one device.
        memory_gb_per_s: its bandwidth.
        node_gb_per_s: link to a device of the same node, one direction.
        network_gb_per_s: link to a device of another node, one direction.
        node_size: devices of one node.
        peak_tflops: only for devices that are not in hardware.py.
        launch_ms: time to start one layer's kernels from Python, where the device has nothing else to do meanwhile.
    """

    name: str
    device_name: str
    memory_gib: float
    memory_gb_per_s: float
    node_gb_per_s: float
    network_gb_per_s: float
    node_size: int = 8
    peak_tflops: float | None = None
    launch_ms: float = 0.03
    matmul_fraction: float = 0.62
    expert_fraction: float = 0.45
    attention_fraction: float = 0.45
    memory_fraction: float = 0.8
    node_latency_ms: float = 0.01
    network_latency_ms: float = 0.03

    @property
    def frees_outputs(self) -> bool:
        """Whether stages free what they have sent, which is done on GPUs only (model/transformer_config.py)."""
        return self.name != "cpu"

    def peak_flops_per_ms(self, dtype: Dtype) -> float:
        """Dense peak.

        Raises:
            PlanError: the device has no units for this dtype.
        """
        peak = self.peak_tflops or dense_peak_tflops(self.device_name, dtype)
        if peak is None:
            raise PlanError(
                f"precision.dtype = {dtype}: hardware {self.name!r} has no units for it. Use another dtype or another --hardware."
            )
        return peak * 1e9


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            name="h100",
            device_name="H100",
            memory_gib=79.6,
            memory_gb_per_s=3350,
            node_gb_per_s=450,
            network_gb_per_s=50,
        ),
        Machine(
            name="h200",
            device_name="H200",
            memory_gib=140,
            memory_gb_per_s=4800,
            node_gb_per_s=450,
            network_gb_per_s=50,
        ),
        Machine(
            name="h800",
            device_name="H800",
            memory_gib=79.6,
            memory_gb_per_s=3350,
            node_gb_per_s=200,
            network_gb_per_s=50,
        ),
        Machine(
            name="h20", device_name="H20", memory_gib=95, memory_gb_per_s=4000, node_gb_per_s=450, network_gb_per_s=50
        ),
        Machine(
            name="b200",
            device_name="B200",
            memory_gib=178,
            memory_gb_per_s=8000,
            node_gb_per_s=900,
            network_gb_per_s=50,
        ),
        Machine(
            name="gb200",
            device_name="GB200",
            memory_gib=184,
            memory_gb_per_s=8000,
            node_gb_per_s=900,
            network_gb_per_s=50,
            node_size=72,
        ),
        Machine(
            name="a100",
            device_name="A100",
            memory_gib=79.2,
            memory_gb_per_s=2039,
            node_gb_per_s=300,
            network_gb_per_s=25,
        ),
        Machine(
            name="l40s",
            device_name="L40S",
            memory_gib=44.4,
            memory_gb_per_s=864,
            node_gb_per_s=25,
            network_gb_per_s=12.5,
        ),
        Machine(
            name="mi300x",
            device_name="MI300X",
            memory_gib=191,
            memory_gb_per_s=5300,
            node_gb_per_s=310,
            network_gb_per_s=50,
        ),
        # One core of a server in fp32, a process for each: for first tries. `megatron-mtp profile` knows better.
        Machine(
            name="cpu",
            device_name="CPU",
            memory_gib=4,
            memory_gb_per_s=8,
            node_gb_per_s=1.5,
            network_gb_per_s=1.0,
            peak_tflops=0.08,
            launch_ms=0.5,
            node_latency_ms=0.1,
            network_latency_ms=0.2,
        ),
    )
}
DEFAULT_MACHINE = "h100"
USABLE = 0.94
"""Share of a device's memory that a plan may fill; the rest is for the driver, communication buffers and fragments."""


def find_machine(name: str) -> Machine:
    """A machine by its name.

    Raises:
        PlanError: it is not known; the message names the nearest one.
    """
    if name.lower() in MACHINES:
        return MACHINES[name.lower()]
    close = difflib.get_close_matches(name.lower(), MACHINES, n=1, cutoff=0.4)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise PlanError(
        f"--hardware {name!r} is not known.{meant} Known: {', '.join(MACHINES)}. Or measure: --profile FILE."
    )
