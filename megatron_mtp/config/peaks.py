"""Dense peak rates of known devices, the denominator of MFU.

Dense means without structured sparsity, which data sheets quote at twice the rate. Half precision accumulates in fp32;
fp32 is the rate of the ordinary cores, because torch does not use TF32 for matrix products unless asked to.

Sources: NVIDIA and AMD data sheets of each device (HGX B300 and GB300 NVL72, MI325X and MI355X among them).
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any, Literal

from megatron_mtp.config.knob import knob

Dtype = Literal["fp32", "bf16", "fp16"]


def rate() -> Any:
    """A rate in TFLOP/s or GB/s: far from what would make a time infinite or zero."""
    return knob(MISSING, ge=1e-6, le=1e9)


@dataclass(frozen=True, slots=True)
class Peaks:
    """Dense peak rates of one device in TFLOP/s; None: the device has no units for this dtype."""

    bf16: float | None = rate()
    fp16: float = rate()
    fp32: float = rate()
    fp8: float | None = knob(None, ge=1e-6, le=1e9)
    """Both formats, E4M3 and E5M2, and the same rate with scales of blocks (MXFP8 on Blackwell)."""

    def of(self, dtype: Dtype) -> float | None:
        """The peak for matrix products in `dtype`."""
        return {"bf16": self.bf16, "fp16": self.fp16, "fp32": self.fp32}[dtype]


PEAKS = {
    "GB300": Peaks(2500.0, 2500.0, 80.0, 5000.0),
    "B300": Peaks(2250.0, 2250.0, 75.0, 4500.0),
    "GB200": Peaks(2500.0, 2500.0, 80.0, 5000.0),
    "B200": Peaks(2250.0, 2250.0, 75.0, 4500.0),
    "H200 NVL": Peaks(835.5, 835.5, 60.0, 1671.0),
    "H200": Peaks(989.4, 989.4, 66.9, 1978.9),
    "GH200": Peaks(989.4, 989.4, 66.9, 1978.9),
    "H100 NVL": Peaks(835.5, 835.5, 60.0, 1671.0),
    "H100 PCIE": Peaks(756.0, 756.0, 51.2, 1513.0),
    "H100": Peaks(989.4, 989.4, 66.9, 1978.9),
    "H800 PCIE": Peaks(756.0, 756.0, 51.2, 1513.0),
    "H800": Peaks(989.4, 989.4, 66.9, 1978.9),
    "H20": Peaks(148.0, 148.0, 44.0, 296.0),
    "A100": Peaks(312.0, 312.0, 19.5),
    "A800": Peaks(312.0, 312.0, 19.5),
    "A30": Peaks(165.0, 165.0, 10.3),
    "A40": Peaks(149.7, 149.7, 37.4),
    "A10": Peaks(125.0, 125.0, 31.2),
    "L40S": Peaks(362.0, 362.0, 91.6, 733.0),
    "L40": Peaks(181.0, 181.0, 90.5),
    "L4": Peaks(121.0, 121.0, 30.3),
    "RTX 5090": Peaks(209.5, 209.5, 104.8),
    "RTX 4090": Peaks(165.2, 165.2, 82.6),
    "RTX 3090": Peaks(71.0, 71.0, 35.6),
    "V100 PCIE": Peaks(None, 112.0, 14.0),
    "V100": Peaks(None, 125.0, 15.7),
    "T4": Peaks(None, 65.0, 8.1),
    "MI355X": Peaks(2516.6, 2516.6, 157.3, 5033.2),
    "MI350X": Peaks(2306.9, 2306.9, 144.2, 4613.7),
    "MI325X": Peaks(1307.4, 1307.4, 163.4, 2614.9),
    "MI300X": Peaks(1307.4, 1307.4, 163.4, 2614.9),
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
