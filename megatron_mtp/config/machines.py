"""What known devices reach in practice: memory, links and efficiency, for the planner's estimates.

Sources: NVIDIA and AMD data sheets of each device: memory size and bandwidth, links in one direction. The network is
one 400 Gbit/s port for each device (200 for A100, 100 for PCIe cards, 800 for B300 and GB300).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass
from typing import Any

from megatron_mtp.config.form import read_form
from megatron_mtp.config.knob import knob
from megatron_mtp.config.peaks import PEAKS, Dtype, Peaks, rate
from megatron_mtp.config.units import GIB
from megatron_mtp.errors import ConfigError, Problem, nearest

USABLE = 0.94
"""Share of a device's memory that a plan may fill; the rest is for the driver, communication buffers and fragments."""


def _fraction(share: float) -> Any:
    return knob(share, ge=1e-6, le=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One kind of device, and what connects it to others, for estimates before anything is measured.

    Fractions of the peak are what large matrix products, attention and grouped expert products reach in practice. They
    and the other constants were fitted to published runs (docs/planning.md); `megatron-mtp profile` replaces them by
    measurements.

    Args:
        name: for `dist.hardware` and `--hardware`.
        memory_gib: memory of one device.
        memory_gb_per_s: memory bandwidth.
        node_gb_per_s: link to a device of the same node, one direction.
        network_gb_per_s: link to a device of another node, one direction.
        node_size: devices of one node.
        launch_ms: time to start one layer's kernels from Python while the device has nothing else to do.
        host_ms: time of Python for one pass through a dense layer; on the device a layer is never faster.
        host_expert_factor: by which a layer of experts takes longer, as it waits for the numbers of routed tokens.
        host_fp8_factor, host_overlap_factor: the same for FP8, and for the schedule that overlaps exchanges.
        host_graph_share: what is left of it where attention and router are replayed as CUDA graphs.
        overlapped_share: of messages that run beside products, the part that is not hidden.
        narrow_width: a product whose matrix is this narrow reaches half of the fraction of a wide one.
        matmul_fraction, fp8_fraction: of the peak that linear layers reach, in half precision and in FP8.
        expert_fraction, fp8_expert_fraction: the same for grouped products of experts.
        attention_fraction: of the peak in half precision, for scores and weighted values.
        memory_fraction, link_fraction: of their bandwidth that memory and links reach.
        is_cpu: count what torch's CPU kernels keep; stages do not free what they have sent.
    """

    name: str
    peaks: Peaks
    memory_gib: float = knob(MISSING, gt=0, le=1e6)
    memory_gb_per_s: float = rate()
    node_gb_per_s: float = rate()
    network_gb_per_s: float = rate()
    node_size: int = knob(8, ge=1, le=100_000)
    launch_ms: float = knob(0.03, ge=0, le=1e6)
    host_ms: float = knob(0.0, ge=0, le=1e6)
    host_expert_factor: float = knob(8.1, ge=1, le=1e3)
    host_fp8_factor: float = knob(1.6, ge=1, le=1e3)
    host_graph_share: float = _fraction(0.37)
    host_overlap_factor: float = knob(1.6, ge=1, le=1e3)
    overlapped_share: float = _fraction(0.2)
    matmul_fraction: float = _fraction(0.62)
    fp8_fraction: float = _fraction(0.5)
    expert_fraction: float = _fraction(0.45)
    fp8_expert_fraction: float = _fraction(0.35)
    attention_fraction: float = _fraction(0.45)
    narrow_width: float = knob(0.0, ge=0, le=1e6)
    memory_fraction: float = _fraction(0.8)
    link_fraction: float = _fraction(0.8)
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
        return self._rate(self.peaks.of(dtype), dtype, "precision.dtype")

    def fp8_flops_per_ms(self, recipe: str) -> float:
        """Dense peak in FP8.

        Raises:
            ConfigError: the device has no units for it.
        """
        return self._rate(self.peaks.fp8, recipe, "--assume fp8")

    def _rate(self, peak: float | None, value: str, field: str) -> float:
        if peak is None:
            rule = f"{self.name} has no units for it"
            remedy = f"Use another value of {field}, or another device in dist.hardware or --hardware."
            raise ConfigError(Problem(fields=(field, "dist.hardware"), value=value, rule=rule, remedy=remedy))
        return peak * 1e9


def _gpu(
    name: str, memory_gib: float, memory: float, node: float, network: float, *, node_size: int = 8, **reached: Any
) -> Machine:
    return Machine(
        name=name,
        peaks=PEAKS[name.upper()],
        memory_gib=memory_gib,
        memory_gb_per_s=memory,
        node_gb_per_s=node,
        network_gb_per_s=network,
        node_size=node_size,
        **reached,
    )


# Fitted to the even rows of benchmarks/published_runs.csv by benchmarks/plan_published.py --fit, in two digits. Grouped
# products in bfloat16 on Hopper are in no row; they are as on other devices.
_SOFTWARE: dict[str, Any] = {"host_ms": 0.38, "memory_fraction": 0.94, "link_fraction": 1.00, "narrow_width": 130.0}
_HOPPER = _SOFTWARE | {
    "matmul_fraction": 0.55,
    "fp8_fraction": 0.53,
    "expert_fraction": 0.45,
    "fp8_expert_fraction": 0.64,
    "attention_fraction": 0.47,
}
_BLACKWELL = _SOFTWARE | {
    "matmul_fraction": 0.44,
    "fp8_fraction": 0.51,
    "expert_fraction": 0.48,
    "fp8_expert_fraction": 0.43,
    "attention_fraction": 0.47,
}
# The same peaks in the data sheets at a higher power, and twice the rate of exponentials: one factor for all fractions.
_BLACKWELL_ULTRA = _SOFTWARE | {name: 1.26 * value for name, value in _BLACKWELL.items() if name not in _SOFTWARE}
_MACHINES = (
    #     name, memory in GiB; GB/s of memory, node and network
    _gpu("h100", 79.6, 3350, 450, 50, **_HOPPER),
    _gpu("h200", 140, 4800, 450, 50, **_HOPPER),
    _gpu("h800", 79.6, 3350, 200, 50, **_HOPPER),
    _gpu("h20", 95, 4000, 450, 50, **_HOPPER),
    _gpu("b200", 178, 8000, 900, 50, **_BLACKWELL),
    _gpu("b300", 268, 8000, 900, 100, **_BLACKWELL_ULTRA),
    _gpu("gb200", 184, 8000, 900, 50, node_size=72, **_BLACKWELL),
    _gpu("gb300", 268, 8000, 900, 100, node_size=72, **_BLACKWELL_ULTRA),
    _gpu("a100", 79.2, 2039, 300, 25),
    _gpu("l40s", 44.4, 864, 25, 12.5),
    _gpu("mi300x", 191, 5300, 310, 50),
    _gpu("mi325x", 255, 6000, 310, 50),
    _gpu("mi355x", 287, 8000, 375, 50),
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
