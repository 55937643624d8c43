"""Rates of a step: tokens, floating-point operations, and their share of the device's peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.peaks import dense_peak_tflops
from megatron_mtp.parallel.flops import train_flops_per_token


class Rates(TypedDict):
    """Rates of each device, under the names of StepRecord's fields."""

    tokens_per_s_per_device: float
    tflops_per_device: float
    mfu: float | None


@dataclass(frozen=True, slots=True)
class Throughput:
    """Turns samples and seconds into rates for each device.

    Args:
        flops_per_token: FLOPs of forward and backward pass without recomputation.
        seq_length: tokens in a sample.
        num_devices: devices of the run.
        peak_tflops: dense peak of one device in the training dtype; None where unknown.
    """

    flops_per_token: float
    seq_length: int
    num_devices: int
    peak_tflops: float | None

    @classmethod
    def of(cls, cfg: ConfigContainer, num_devices: int, device_name: str) -> Throughput:
        """For a run on devices of that name; logger.device_peak_tflops overrides the table."""
        peak = cfg.logger.device_peak_tflops or dense_peak_tflops(device_name, cfg.precision.dtype)
        return cls(train_flops_per_token(cfg.model), cfg.model.seq_length, num_devices, peak)

    def flops(self, samples: int) -> float:
        """Model FLOPs of a step over these samples."""
        return self.flops_per_token * self.seq_length * samples

    def rates(self, samples: int, elapsed_s: float) -> Rates:
        """Rates of a step over these samples that took `elapsed_s` seconds."""
        tflops = self.flops(samples) / elapsed_s / self.num_devices / 1e12
        return {
            "tokens_per_s_per_device": samples * self.seq_length / elapsed_s / self.num_devices,
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
        }
