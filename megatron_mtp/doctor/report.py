"""Runs the checks of `doctor`, prints them, and writes the report for bug reports."""

from __future__ import annotations

import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import megatron_mtp
from megatron_mtp.doctor.checks import CHECKS, Finding, version
from megatron_mtp.observe.env import effective_environment, redact
from megatron_mtp.observe.logs import silence_noise

REPORTED_PACKAGES = (
    "megatron-core torch triton numpy nvidia-nccl-cu12 nvidia-nccl-cu13 nvidia-cudnn-cu12 nvidia-cudnn-cu13 "
    "transformer-engine flash-attn apex typer rich tensorboard wandb tokenizers sentencepiece tiktoken safetensors "
    "transformers psutil setuptools pybind11"
).split()
"""Packages whose versions explain most bugs."""


def examine(checks: Iterable[Callable[[], Iterator[Finding]]] = CHECKS) -> list[Finding]:
    """Runs every check. One that raises becomes a finding, and the others still run."""
    silence_noise()
    findings: list[Finding] = []
    for check in checks:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                findings.extend(check())
        # A broken package may also call sys.exit while it is imported.
        except (Exception, SystemExit) as error:
            name, advice = check.__name__.removeprefix("check_"), "Attach `doctor --report FILE` to a bug report."
            findings.append(Finding(name.replace("_", " "), "failed", f"{type(error).__name__}: {error}", advice))
    return findings


def abilities(findings: list[Finding]) -> dict[str, bool]:
    """What the machine can run, by the findings."""
    state = {finding.name: finding.state for finding in findings}

    def works(*names: str) -> bool:
        return all(state.get(name) == "ok" for name in names)

    base = works("Python", "torch", "Megatron-Core")
    gpus = sum(name.startswith("GPU ") and value == "ok" for name, value in state.items())
    return {
        "training on the CPU": base and works("gloo"),
        "training on a GPU": base and gpus > 0,
        "training on several GPUs of this machine": base and gpus > 1 and works("NCCL"),
        "Transformer Engine backend": base and gpus > 0 and works("Transformer Engine"),
    }


def as_dict(findings: list[Finding]) -> dict[str, Any]:
    """Everything as plain data, for `--json`."""
    return {
        "version": megatron_mtp.__version__,
        "can_run": abilities(findings),
        "findings": [asdict(finding) for finding in findings],
        "environment": effective_environment(),
    }


def print_table(findings: list[Finding]) -> None:
    """Prints the findings for a person."""
    from rich.console import Console
    from rich.table import Table

    styles = {"ok": "green", "absent": "dim", "warning": "yellow", "failed": "bold red"}
    table = Table(title=f"megatron-mtp {megatron_mtp.__version__} on this machine")
    for title in ("what", "state", "found", "what to do"):
        # Long paths are wrapped, not cut.
        table.add_column(title, overflow="fold")
    for finding in findings:
        # Paths and error texts may contain brackets, which are markup in Rich.
        texts = (text.replace("[", r"\[") for text in (finding.found, finding.advice))
        table.add_row(finding.name, f"[{styles[finding.state]}]{finding.state}[/]", *texts)
    console = Console()
    console.print(table)
    for ability, can in abilities(findings).items():
        console.print(f"  {'[green]yes[/]' if can else '[dim]no [/]'}  {ability}")


def report_text(findings: list[Finding]) -> str:
    """The report: findings, versions and environment, without secrets and the user's home directory."""
    lines = [
        f"megatron-mtp {megatron_mtp.__version__} doctor, {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"commit: {_commit()}",
        "",
    ]
    for finding in findings:
        advice = f"  -> {finding.advice}" if finding.advice else ""
        lines.append(f"{finding.state:8} {finding.name}: {redact('', finding.found)}{advice}")
    lines += ["", *(f"{'yes' if can else 'no':8} {ability}" for ability, can in abilities(findings).items())]
    lines += ["", "packages:", *(f"  {name} {found}" for name in REPORTED_PACKAGES if (found := version(name)))]
    lines += ["", "environment:", *(f"  {name}={value}" for name, value in effective_environment().items())]
    return ("\n".join(lines) + "\n").replace(str(Path.home()), "~")


def _commit() -> str:
    """The commit of a checkout, marked if files were changed."""
    folder = str(Path(megatron_mtp.__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
