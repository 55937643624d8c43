"""The checks of `doctor`: each is a function that returns findings with advice.

Native extensions are imported in a separate process: one built for another torch can crash the process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from megatron_mtp.config.units import GIB

IMPORT_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Args:
        name: what was checked.
        state: ok; absent (optional and not installed); warning (works, but needs attention); failed (training needs
            it).
        found: what was found.
        advice: what to do; empty if nothing.
    """

    name: str
    state: Literal["ok", "absent", "warning", "failed"]
    found: str
    advice: str = ""


def _warn_if(is_low: bool, name: str, found: str, advice: str) -> Finding:
    return Finding(name, "warning", found, advice) if is_low else Finding(name, "ok", found)


def check_python() -> Iterator[Finding]:
    """The Python interpreter."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] == (3, 12):
        yield Finding("Python", "ok", found)
    else:
        yield Finding("Python", "failed", found, "Megatron-Core 0.19 needs Python 3.12: run `make setup`.")


def check_machine() -> Iterator[Finding]:
    """Operating system, cores, memory, disk and working directory."""
    import psutil

    yield Finding("system", "ok", f"{platform.platform()}, {platform.machine()}")
    usable, cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), os.cpu_count()
    yield Finding("CPU cores", "ok", f"{usable} usable of {cores}")
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} GiB available of {memory.total / GIB:.1f} GiB"
    advice = "The demo needs about 4 GiB: close other programs."
    yield _warn_if(memory.available < 4 * GIB, "memory", found, advice)
    disk = shutil.disk_usage(".")
    found = f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f} GiB here"
    advice = "Checkpoints need space: set checkpoint.save to a folder on a larger disk."
    yield _warn_if(disk.free < 5 * GIB, "disk", found, advice)
    try:
        with tempfile.TemporaryFile(dir="."):
            pass
        yield Finding("this folder", "ok", "can be written")
    except OSError as error:
        advice = "Run from a folder that you can write to, or set logger.log_dir and checkpoint.save to one."
        yield Finding("this folder", "warning", f"cannot be written: {error.strerror}", advice)


def check_compiler() -> Iterator[Finding]:
    """The compiler for torch.compile, and for Megatron-Core's dataset helpers if the wheel lacks them."""
    if compiler := shutil.which("g++") or shutil.which("c++"):
        yield Finding("C++ compiler", "ok", compiler)
    else:
        advice = "Needed by torch.compile only. Debian, Ubuntu: apt install g++."
        yield Finding("C++ compiler", "absent", "none on PATH", advice)


def check_torch() -> Iterator[Finding]:
    """torch, and the platform it was built for."""
    import torch

    cuda, hip = torch.version.cuda, torch.version.hip
    built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU only"
    found = f"{torch.__version__}, built for {built}, {torch.get_num_threads()} threads"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        yield Finding("torch", "failed", found, "This project needs 2.11 or newer: run `make setup`.")
    else:
        yield Finding("torch", "ok", found)


def check_gpus() -> Iterator[Finding]:
    """The GPUs that torch can use, or why it cannot use those of the machine."""
    import torch

    if not torch.cuda.is_available():
        yield _no_gpu(torch.version.cuda or torch.version.hip)
        return
    from megatron_mtp.config.peaks import dense_peak_tflops

    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        peak = dense_peak_tflops(gpu.name, "bf16")
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        found = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, capability {gpu.major}.{gpu.minor}, {bf16}"
        if peak is None:
            advice = "Its peak speed is unknown; set logger.device_peak_tflops to see MFU."
            yield Finding(f"GPU {index}", "ok", found, advice)
        else:
            yield Finding(f"GPU {index}", "ok", f"{found}, {peak:g} dense bf16 TFLOP/s")


def _no_gpu(built_for: str | None) -> Finding:
    tool = shutil.which("nvidia-smi") or shutil.which("rocm-smi")
    listed = _output([tool, "-L" if "nvidia" in tool else "--showproductname"]) if tool else None
    if not listed:
        advice = "Use dist.device = cpu, and the recipes for small machines."
        return Finding("GPU", "absent", "none; training runs on the CPU", advice)
    if not built_for:
        advice = "This torch is a CPU build: install the build for CUDA or ROCm."
    else:
        advice = "Check CUDA_VISIBLE_DEVICES, and whether the driver is new enough for the CUDA version of this torch."
    found = f"torch sees none, but {os.path.basename(tool or '')} lists: {listed.splitlines()[0]}"
    return Finding("GPU", "warning", found, advice)


def check_collectives() -> Iterator[Finding]:
    """gloo, by an all-reduce of one process, and NCCL, by its version."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield Finding("gloo", "warning", "not tested: this process is part of a job")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
        try:
            total = torch.ones(2)
            dist.all_reduce(total)
        finally:
            dist.destroy_process_group()
        works = total.tolist() == [1, 1]
        yield Finding("gloo", *("ok", "an all-reduce works") if works else ("failed", f"all-reduce gave {total}"))
    if torch.cuda.is_available() and dist.is_nccl_available():
        yield Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
        yield from _shared_memory()
    else:
        yield Finding("NCCL", "absent", "no GPU to use it with" if dist.is_nccl_available() else "not in this torch")


def _shared_memory() -> Iterator[Finding]:
    if not os.path.isdir("/dev/shm"):
        return
    size = shutil.disk_usage("/dev/shm").total
    advice = "NCCL uses it between processes of one machine: start the container with --shm-size=8g or --ipc=host."
    yield _warn_if(size < GIB, "shared memory", f"{size / GIB:.2f} GiB", advice)


def check_megatron() -> Iterator[Finding]:
    """Megatron-Core and its compiled dataset helpers."""
    version = importlib.metadata.version("megatron-core")
    supported = version.startswith("0.19.")
    advice = "" if supported else "This project is made for 0.19: run `make setup`."
    # Importing the helpers imports megatron.core first, so one process checks both.
    broken = import_error("megatron.core.datasets.helpers_cpp")
    has_helpers = not (broken and "helpers_cpp" in broken)
    if broken and has_helpers:
        yield Finding("Megatron-Core", "failed", f"{version}, import failed: {broken}", advice or "Run `make setup`.")
        return
    yield Finding("Megatron-Core", "ok" if supported else "failed", version, advice)
    if has_helpers:
        yield Finding("dataset helpers", "ok", "compiled")
    else:
        command = "python -c 'from megatron.core.datasets.utils import compile_helpers; compile_helpers()'"
        advice = f"Needs g++, make and pybind11, then: {command}"
        yield Finding("dataset helpers", "warning", "not compiled for this platform", advice)


def check_transformer_engine() -> Iterator[Finding]:
    """NVIDIA's fused kernels and FP8."""
    if not importlib.util.find_spec("transformer_engine"):
        advice = "Optional, for NVIDIA GPUs: EXTRAS=dev,hf,te make setup. Without it, model.backend = torch is used."
        yield Finding("Transformer Engine", "absent", "not installed", advice)
    elif broken := import_error("transformer_engine.pytorch"):
        advice = "It must match torch and its CUDA version: reinstall it, or remove it and use model.backend = torch."
        yield Finding("Transformer Engine", "warning", f"installed, but the import failed: {broken}", advice)
    else:
        yield Finding("Transformer Engine", "ok", version("transformer-engine") or "installed, version unknown")


def check_apex() -> Iterator[Finding]:
    """NVIDIA's Apex. The package `apex` on PyPI is another project, which Megatron-Core mistakes for NVIDIA's."""
    if not importlib.util.find_spec("apex"):
        advice = "Not needed: Megatron-Core uses torch's optimizers and norms instead."
        yield Finding("Apex", "absent", "not installed", advice)
    elif broken := import_error("apex.multi_tensor_apply", "apex.optimizers"):
        found = f"a package named apex is installed, but it is not NVIDIA's or is broken: {broken}"
        advice = "Uninstall it (`uv pip uninstall apex`): PyPI's apex is another project. Build NVIDIA's from source."
        yield Finding("Apex", "warning", found, advice)
    else:
        yield Finding("Apex", "ok", "NVIDIA's")


# (package, module, purpose, how to install it)
OPTIONAL = (
    ("tensorboard", "tensorboard", "TensorBoard records", "make setup"),
    ("wandb", "wandb", "Weights & Biases records", "make setup"),
    ("transformers", "transformers", "checks against Hugging Face models", "make setup"),
    ("emerging-optimizers", "emerging_optimizers", "optimizer.optimizer = muon", "uv pip install emerging-optimizers"),
)


def check_optional_packages() -> Iterator[Finding]:
    """Optional packages, each needed by one feature."""
    for package, module, purpose, command in OPTIONAL:
        if importlib.util.find_spec(module):
            yield Finding(package, "ok", f"{version(package) or 'installed, version unknown'} ({purpose})")
        else:
            yield Finding(package, "absent", f"not installed ({purpose})", f"To use it: {command}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_machine,
    check_compiler,
    check_torch,
    check_gpus,
    check_collectives,
    check_megatron,
    check_transformer_engine,
    check_apex,
    check_optional_packages,
)


def import_error(*modules: str) -> str | None:
    """Imports modules in a separate process.

    Returns:
        None if all imports succeed, else the last line of the error.
    """
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    command = [sys.executable, "-W", "ignore", "-c", code, *modules]
    try:
        done = _run(command, IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no answer in {IMPORT_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the process ended with {done.returncode}"


def version(package: str) -> str | None:
    """The version of an installed package; None if its metadata is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)


def _output(command: list[str]) -> str | None:
    try:
        done = _run(command, 20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None
