"""Versions and environment variables that change the results or the speed of a run."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

# Prefixes of libraries that compute or communicate. MASTER_ADDR and the like only name machines.
PREFIXES = tuple(
    """CUBLAS_ CUDA_ CUDNN_ FLASH_ATTENTION_ GLOO_ GOMP_ HIP_ HSA_ KMP_ MIOPEN_ MKL_ NCCL_ NVIDIA_TF32_ NVTE_ OMP_
    OPENBLAS_ PYTORCH_ RCCL_ ROCR_ TOKENIZERS_ TORCH TRITON_ UB_ UCC_ UCX_""".split()
)
NAMES = ("LD_PRELOAD", "MEGATRON_MTP_LOG", "PYTHONHASHSEED", "PYTHONOPTIMIZE", "WANDB_MODE")
# torchrun and torch set these for themselves; they change neither results nor speed.
BOOKKEEPING = ("TORCHELASTIC_", "TORCHINDUCTOR_CACHE_DIR")

_SECRET = re.compile(r"key|token|secret|passw|credential|auth|cookie", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(\w+://)[^/@\s]+@")


PACKAGES = ("megatron-mtp", "megatron-core", "torch", "transformer-engine", "numpy")


def package_versions() -> dict[str, str]:
    """Versions of Python and of PACKAGES, without those that are not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def effective_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that are set and can change results or speed, sorted by name, secrets redacted.

    Args:
        environ: None: this process's.
    """
    environ = os.environ if environ is None else environ
    chosen = (n for n in environ if (n.startswith(PREFIXES) or n in NAMES) and not n.startswith(BOOKKEEPING))
    return {name: redact(name, environ[name]) for name in sorted(chosen)}


def redact(name: str, value: str) -> str:
    """The value, or `<hidden>` if its name or its form looks like a secret.

    >>> redact("HF_TOKEN", "hf_abc"), redact("PROXY", "http://me:pw@host/"), redact("OMP_NUM_THREADS", "4")
    ('<hidden>', 'http://<hidden>@host/', '4')
    """
    if (_SECRET.search(name) and not name.startswith("TOKENIZERS_")) or _looks_secret(value):
        return "<hidden>"
    return _USER_IN_URL.sub(r"\1<hidden>@", value)


def _looks_secret(value: str) -> bool:
    """Whether the value has the form of an access key: a known prefix, or a long string of mixed letters and digits."""
    if re.match(r"(hf_|sk-|gh[pousr]_|glpat-|xox[a-z]-|AKIA|eyJ)\w", value):
        return True
    mixed = re.search(r"\d", value) and re.search(r"[a-zA-Z]", value)
    return bool(mixed and re.fullmatch(r"[A-Za-z0-9+=_-]{32,}", value))
