"""Sizes of a finalized config for people and for programs: parameters, depths, parallel sizes, processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.phase_configs import fewest_processes
from megatron_mtp.parallel.params import ParameterCount, count_parameters

CPU_LIMIT = 300_000_000
"""Models up to about this many parameters train on a CPU in reasonable time."""


def facts(cfg: ConfigContainer) -> dict[str, Any]:
    """Sizes as plain data; parameters are None while the vocabulary is not known."""
    model = cfg.model
    count = count_parameters(model) if model.vocab_size else None
    return {
        "parameters": None if count is None else _parameters(count),
        "mtp_num_layers": model.mtp_num_layers,
        "mtp_loss_scaling_factor": model.mtp_loss_scaling_factor,
        "parallel": {
            "tensor": model.tensor_model_parallel_size,
            "sequence": model.sequence_parallel,
            "pipeline": model.pipeline_model_parallel_size,
            "virtual_pipeline": model.virtual_pipeline_model_parallel_size,
            "context": model.context_parallel_size,
            "expert": model.expert_model_parallel_size,
            "expert_tensor": model.expert_tensor_parallel_size,
        },
        "processes": fewest_processes(cfg),
        "devices": "CPU or GPU" if count is not None and count.total <= CPU_LIMIT else "GPU",
    }


def _parameters(count: ParameterCount) -> dict[str, int]:
    names = "total active main main_active embedding output mtp mtp_active".split()
    return {name: getattr(count, name) for name in names}


def short_count(number: int) -> str:
    """A count in three digits: 671B, 30.5B, 1.27M."""
    for factor, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= factor * 0.9995:
            return f"{number / factor:.3g}{suffix}" if number < factor * 999.5 else f"{number / factor:.0f}{suffix}"
    return str(number)


def short_parallel(parallel: dict[str, Any]) -> str:
    """Sizes above 1: "tp 2 sp, pp 16, ep 64"."""
    names = {"tensor": "tp", "pipeline": "pp", "virtual_pipeline": "vp", "context": "cp", "expert": "ep"}
    parts = [f"{short} {parallel[name]}" for name, short in names.items() if parallel[name] > 1]
    if parallel["sequence"]:
        parts[0] += " sp"
    if parallel["expert"] > 1 and parallel["expert_tensor"] != parallel["tensor"]:
        parts[-1] += f" etp {parallel['expert_tensor']}"
    return ", ".join(parts) or "none"


def short_layout(text: str) -> str:
    """A layout with runs of layers shortened: "Ettt|tttt|...|ttmL" -> "Et*3|(t*4|)*14 t*2mL" for reading only."""
    chunks = ("".join(s if n == 1 else f"{s}*{n}" for s, n in _runs(chunk)) or "-" for chunk in text.split("|"))
    return " | ".join(chunk if count == 1 else f"({chunk}) x {count}" for chunk, count in _runs(chunks))


def _runs(values: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Equal neighbours, once each, and how many there are."""
    return ((value, len(list(run))) for value, run in groupby(values))
