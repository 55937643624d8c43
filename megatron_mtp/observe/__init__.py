"""Metrics with units, where they are written, and early warnings. Imports torch nowhere and megatron never."""

from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.observe.metrics import StepRecord
from megatron_mtp.observe.recorder import Recorder, RunInfo, metrics_path

__all__ = ["Recorder", "RunInfo", "StepRecord", "metrics_path", "read_metrics"]
