"""Dense peak rates of known devices, the denominator of MFU.

Dense means without structured sparsity, which data sheets quote at twice the rate. A device that is not here has no MFU
rather than a wrong one; logger.device_peak_tflops names its peak.

Sources: NVIDIA and AMD data sheets of each device. Half precision accumulates in fp32; fp32 is the rate of the ordinary
cores, because torch does not use TF32 for matrix products unless asked to.
"""

from __future__ import annotations

from typing import Literal

Dtype = Literal["fp32", "bf16", "fp16"]

# Words that mark another chip under a known name, or a part of one.
OTHER_CHIPS = (" LAPTOP ", " MAX Q ", " MIG ", " D ")
# Words that a device name must contain -> (bf16, fp16, fp32) in TFLOP/s; the first match holds. None: not supported.
PEAK_TFLOPS: list[tuple[tuple[str, ...], tuple[float | None, float, float]]] = [
    (("GB200",), (2500.0, 2500.0, 80.0)),
    (("B200",), (2250.0, 2250.0, 75.0)),
    (("H200", "NVL"), (835.5, 835.5, 60.0)),
    (("H200",), (989.4, 989.4, 66.9)),
    (("GH200",), (989.4, 989.4, 66.9)),
    (("H100", "NVL"), (835.5, 835.5, 60.0)),
    (("H100", "PCIE"), (756.0, 756.0, 51.2)),
    (("H100",), (989.4, 989.4, 66.9)),
    (("H800", "PCIE"), (756.0, 756.0, 51.2)),
    (("H800",), (989.4, 989.4, 66.9)),
    (("H20",), (148.0, 148.0, 44.0)),
    (("A100",), (312.0, 312.0, 19.5)),
    (("A800",), (312.0, 312.0, 19.5)),
    (("A30",), (165.0, 165.0, 10.3)),
    (("A40",), (149.7, 149.7, 37.4)),
    (("A10",), (125.0, 125.0, 31.2)),
    (("L40S",), (362.0, 362.0, 91.6)),
    (("L40",), (181.0, 181.0, 90.5)),
    (("L4",), (121.0, 121.0, 30.3)),
    (("RTX 5090",), (209.5, 209.5, 104.8)),
    (("RTX 4090",), (165.2, 165.2, 82.6)),
    (("RTX 3090",), (71.0, 71.0, 35.6)),
    (("V100", "PCIE"), (None, 112.0, 14.0)),
    (("V100",), (None, 125.0, 15.7)),
    (("T4",), (None, 65.0, 8.1)),
    (("MI355X",), (2516.6, 2516.6, 157.3)),
    (("MI350X",), (2306.9, 2306.9, 144.2)),
    (("MI325X",), (1307.4, 1307.4, 163.4)),
    (("MI300X",), (1307.4, 1307.4, 163.4)),
    (("MI250X",), (191.5, 191.5, 23.9)),  # one of its two dies, which is one device to torch
]


def dense_peak_tflops(device_name: str, dtype: Dtype) -> float | None:
    """The dense peak of one device.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, such as "NVIDIA H100 80GB HBM3".
        dtype: of the matrix products.

    Returns:
        TFLOP/s; None for a device that is not in the table, a CPU, or a dtype it has no units for.
    """
    name = f" {device_name.upper().replace('-', ' ')} "
    if any(word in name for word in OTHER_CHIPS):
        return None
    for (model, *variant), rates in PEAK_TFLOPS:
        if f" {model} " in name and all(word in name for word in variant):
            return dict(zip(("bf16", "fp16", "fp32"), rates, strict=True))[dtype]
    return None
