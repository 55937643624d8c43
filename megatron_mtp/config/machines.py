"""What known devices can do: dense peak rates, and for the planner's estimates also memory, links and efficiency.

Dense means without structured sparsity, which data sheets quote at twice the rate. Half precision accumulates in fp32;
fp32 is the rate of the ordinary cores, because torch does not use TF32 for matrix products unless asked to.

Sources: NVIDIA and AMD data sheets of each device: peaks, memory size and bandwidth, links in one direction. The
network is one 400 Gbit/s port for each device (200 for A100, 100 for PCIe cards).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass
from typing import Any, Literal

from megatron_mtp.config.form import read_form
from megatron_mtp.config.knob import knob
from megatron_mtp.config.units import GIB
from megatron_mtp.errors import ConfigError, Problem, nearest

Dtype = Literal["fp32", "bf16", "fp16"]


def _rate() -> Any:
    """A rate in TFLOP/s or GB/s: far from what would make a time infinite or zero."""
    return knob(MISSING, ge=1e-6, le=1e9)


@dataclass(frozen=True, slots=True)
class Peaks:
    """Dense peak rates of one device in TFLOP/s; None: the device has no units for this dtype."""

    bf16: float | None = _rate()
    fp16: float = _rate()
    fp32: float = _rate()

    def of(self, dtype: Dtype) -> float | None:
        """The peak for matrix products in `dtype`."""
        return {"bf16": self.bf16, "fp16": self.fp16, "fp32": self.fp32}[dtype]


PEAKS = {
    "GB200": Peaks(2500.0, 2500.0, 80.0),
    "B200": Peaks(2250.0, 2250.0, 75.0),
    "H200 NVL": Peaks(835.5, 835.5, 60.0),
    "H200": Peaks(989.4, 989.4, 66.9),
    "GH200": Peaks(989.4, 989.4, 66.9),
    "H100 NVL": Peaks(835.5, 835.5, 60.0),
    "H100 PCIE": Peaks(756.0, 756.0, 51.2),
    "H100": Peaks(989.4, 989.4, 66.9),
    "H800 PCIE": Peaks(756.0, 756.0, 51.2),
    "H800": Peaks(989.4, 989.4, 66.9),
    "H20": Peaks(148.0, 148.0, 44.0),
    "A100": Peaks(312.0, 312.0, 19.5),
    "A800": Peaks(312.0, 312.0, 19.5),
    "A30": Peaks(165.0, 165.0, 10.3),
    "A40": Peaks(149.7, 149.7, 37.4),
    "A10": Peaks(125.0, 125.0, 31.2),
    "L40S": Peaks(362.0, 362.0, 91.6),
    "L40": Peaks(181.0, 181.0, 90.5),
    "L4": Peaks(121.0, 121.0, 30.3),
    "RTX 5090": Peaks(209.5, 209.5, 104.8),
    "RTX 4090": Peaks(165.2, 165.2, 82.6),
    "RTX 3090": Peaks(71.0, 71.0, 35.6),
    "V100 PCIE": Peaks(None, 112.0, 14.0),
    "V100": Peaks(None, 125.0, 15.7),
    "T4": Peaks(None, 65.0, 8.1),
    "MI355X": Peaks(2516.6, 2516.6, 157.3),
    "MI350X": Peaks(2306.9, 2306.9, 144.2),
    "MI325X": Peaks(1307.4, 1307.4, 163.4),
    "MI300X": Peaks(1307.4, 1307.4, 163.4),
    "MI250X": Peaks(191.5, 191.5, 23.9),  # one of its two dies, which is one device to torch
}
"""By the words that the device's name contains; the first entry that matches counts."""
OTHER_CHIPS = (" LAPTOP ", " MAX Q ", " MIG ", " D ")
"""Words that mark another chip under a known name, or a part of one."""


def dense_peak_tflops(device_name: str, dtype: Dtype) -> float | None:
    """The dense peak of one device, the denominator of MFU.

    Args:
        device_name: as `torch.cuda.get_device_name` returns it, such as "NVIDIA H100 80GB HBM3".
        dtype: of the matrix products.

    Returns:
        TFLOP/s. None for a CPU, for a dtype that the device has no units for, and for a device that is not in the
        table: no MFU is better than a wrong one, and logger.device_peak_tflops sets the peak.
    """
    name = f" {device_name.upper().replace('-', ' ')} "
    if any(word in name for word in OTHER_CHIPS):
        return None
    for device, peaks in PEAKS.items():
        if set(device.split()) <= set(name.split()):
            return peaks.of(dtype)
    return None


USABLE = 0.94
"""Share of a device's memory that a plan may fill; the rest is for the driver, communication buffers and fragments."""


def _fraction(share: float) -> Any:
    return knob(share, ge=1e-6, le=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One kind of device, and what connects it to others, for estimates before anything is measured.

    Fractions of the peak are what large matrix products, attention and grouped expert products reach in practice. They
    are estimates, the same for all devices; `megatron-mtp profile` replaces them by measurements.

    Args:
        name: for `dist.hardware` and `--hardware`.
        memory_gib: memory of one device.
        memory_gb_per_s: memory bandwidth.
        node_gb_per_s: link to a device of the same node, one direction.
        network_gb_per_s: link to a device of another node, one direction.
        node_size: devices of one node.
        launch_ms: time to start one layer's kernels from Python while the device has nothing else to do.
        is_cpu: count what torch's CPU kernels keep; stages do not free what they have sent.
    """

    name: str
    peaks: Peaks
    memory_gib: float = knob(MISSING, gt=0, le=1e6)
    memory_gb_per_s: float = _rate()
    node_gb_per_s: float = _rate()
    network_gb_per_s: float = _rate()
    node_size: int = knob(8, ge=1, le=100_000)
    launch_ms: float = knob(0.03, ge=0, le=1e6)
    matmul_fraction: float = _fraction(0.62)
    expert_fraction: float = _fraction(0.45)
    attention_fraction: float = _fraction(0.45)
    memory_fraction: float = _fraction(0.8)
    node_latency_ms: float = knob(0.01, ge=0, le=1e6)
    network_latency_ms: float = knob(0.03, ge=0, le=1e6)
    is_cpu: bool = False

    @property
    def usable_bytes(self) -> float:
        """Memory of one device that a plan may use."""
        return self.memory_gib * GIB * USABLE

    def peak_flops_per_ms(self, dtype: Dtype) -> float:
        """Dense peak.

        Raises:
            ConfigError: the device has no units for this dtype.
        """
        peak = self.peaks.of(dtype)
        if peak is None:
            rule = f"{self.name} has no units for it"
            remedy = "Use another dtype, or another device in dist.hardware or --hardware."
            raise ConfigError(
                Problem(fields=("precision.dtype", "dist.hardware"), value=dtype, rule=rule, remedy=remedy)
            )
        return peak * 1e9


def _gpu(name: str, memory_gib: float, memory: float, node: float, network: float, node_size: int = 8) -> Machine:
    return Machine(
        name=name,
        peaks=PEAKS[name.upper()],
        memory_gib=memory_gib,
        memory_gb_per_s=memory,
        node_gb_per_s=node,
        network_gb_per_s=network,
        node_size=node_size,
    )


_MACHINES = (
    #     name, memory in GiB; GB/s of memory, node and network
    _gpu("h100", 79.6, 3350, 450, 50),
    _gpu("h200", 140, 4800, 450, 50),
    _gpu("h800", 79.6, 3350, 200, 50),
    _gpu("h20", 95, 4000, 450, 50),
    _gpu("b200", 178, 8000, 900, 50),
    _gpu("gb200", 184, 8000, 900, 50, node_size=72),
    _gpu("a100", 79.2, 2039, 300, 25),
    _gpu("l40s", 44.4, 864, 25, 12.5),
    _gpu("mi300x", 191, 5300, 310, 50),
    # One core of a server, one process each, in fp32: for first tries. `megatron-mtp profile` is closer.
    Machine(
        name="cpu",
        peaks=Peaks(0.08, 0.08, 0.08),
        memory_gib=4,
        memory_gb_per_s=8,
        node_gb_per_s=1.5,
        network_gb_per_s=1.0,
        launch_ms=0.5,
        node_latency_ms=0.1,
        network_latency_ms=0.2,
        is_cpu=True,
    ),
)
MACHINES = {machine.name: machine for machine in _MACHINES}
"""By name; `dist.hardware` accepts the same names."""
DEFAULT_MACHINE = "h100"


def find_machine(hardware: str | Mapping[str, Any], option: str = "dist.hardware") -> Machine:
    """A known machine by its name, or `base` with some of its fields changed.

    Args:
        option: what names it, for messages.

    Example: {"base": "h100", "name": "h100-ethernet", "network_gb_per_s": 25, "peaks": {"bf16": 900}}.

    Raises:
        ConfigError: a name or a field is unknown (the message names the nearest one), or a value does not fit.
    """
    if isinstance(hardware, Mapping):
        return _changed(hardware, option)
    if hardware.lower() in MACHINES:
        return MACHINES[hardware.lower()]
    rule = f"is not a known device.{nearest(hardware.lower(), MACHINES)} Known: {', '.join(MACHINES)}"
    remedy = "Or describe it in dist.hardware, or measure: --profile FILE."
    raise ConfigError(Problem(fields=(option,), value=hardware, rule=rule, remedy=remedy))


def _changed(hardware: Mapping[str, Any], option: str) -> Machine:
    changes = dict(hardware)
    name = changes.pop("base", DEFAULT_MACHINE)
    if not isinstance(name, str):
        raise ConfigError(Problem(fields=(f"{option}.base",), value=name, rule="must be the name of a device"))
    base = find_machine(name, f"{option}.base")
    data = asdict(base) | {"name": f"changed {base.name}"} | changes
    if isinstance(peaks := data["peaks"], Mapping):
        data["peaks"] = asdict(base.peaks) | dict(peaks)
    machine, problems = read_form(Machine, data, option)
    if machine is None:
        raise ConfigError(problems)
    return machine


def hardware_problems(hardware: str | Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a `dist.hardware` that is set."""
    try:
        find_machine(hardware)
    except ConfigError as error:
        return error.problems
    return []
