"""Environment variables of a job: the user's, secrets by name, and what known devices need."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConfigError, Problem
from megatron_mtp.observe.env import redact

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
SECRET_FORMS = {
    "slurm": (r"/.+", "NAME=/path/of/a/file that only you can read"),
    "k8s": (r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-._a-zA-Z0-9]+", "NAME=SECRET/KEY of a Secret in the namespace"),
}
"""Scheduler -> form of what follows `NAME=` in `--secret`, and the form in words."""
AMD = ("mi",)
OLDER_THAN_BLACKWELL = ("h100", "h200", "h800", "h20", "a100", "l40s")


def read_variables(given: Iterable[str], environ: Mapping[str, str], secret_form: str = "") -> dict[str, str]:
    """`--env NAME=VALUE`, and `--env NAME` with its value in `environ`.

    Args:
        secret_form: what `--secret` takes; "": variables are written nowhere, so they may be secrets.

    Raises:
        ConfigError: a text has another form, a variable is not set here, or others could read a secret.
    """
    found, problems = dict[str, str](), list[Problem]()
    for text in given:
        name, has_value, value = text.partition("=")
        if not re.fullmatch(NAME, name):
            problems.append(_problem("--env", text, "must be NAME=VALUE, or NAME of a variable that is set here"))
            continue
        if not has_value and name not in environ:
            problems.append(_problem("--env", text, "is not set here", f"Set it, or write --env {name}=VALUE."))
            continue
        found[name] = value if has_value else environ[name]
        if not found[name].isprintable():
            problems.append(_problem("--env", text, "must be one line of printable characters"))
        elif secret_form and redact(name, found[name]) != found[name]:
            rule = "looks like a secret, and others can read the job"
            problems.append(_problem("--env", name, rule, f"Use --secret {name}=..., as {secret_form}."))
    if problems:
        raise ConfigError(problems)
    return found


def read_secrets(given: Iterable[str], kind: str) -> dict[str, str]:
    """`--secret NAME=PLACE`: variables whose values stay out of the job.

    Raises:
        ConfigError: a text has another form.
    """
    form, words = SECRET_FORMS[kind]
    found, problems = dict[str, str](), list[Problem]()
    for text in given:
        name, _, place = text.partition("=")
        if re.fullmatch(NAME, name) and re.fullmatch(form, place) and place.isprintable():
            found[name] = place
        else:
            problems.append(_problem("--secret", text, f"must be {words}"))
    if problems:
        raise ConfigError(problems)
    return found


def _problem(option: str, value: str, rule: str, remedy: str = "") -> Problem:
    return Problem(fields=(option,), value=value, rule=rule, remedy=remedy)


def default_environment(cfg: ConfigContainer) -> dict[str, str]:
    """What jobs on this kind of device set. Nothing is guessed about the network: NCCL finds it, or `--env` says it."""
    found = {"PYTHONUNBUFFERED": "1"}  # lines reach the log files when they are printed
    if cfg.dist.device == "cpu":
        return found
    found["NCCL_DEBUG"] = "WARN"  # says why NCCL failed
    ranks_overlap = cfg.model.tensor_model_parallel_size > 1 or cfg.model.context_parallel_size > 1
    if ranks_overlap and _base_device(cfg) in OLDER_THAN_BLACKWELL:
        # Kernels start in the order of their launch, so that communication is not queued behind a matrix product.
        # Megatron-LM requires it for these sizes on every device before Blackwell.
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return found


def is_amd(cfg: ConfigContainer) -> bool:
    """Whether dist.hardware names a device of AMD."""
    return _base_device(cfg).startswith(AMD)


def _base_device(cfg: ConfigContainer) -> str:
    """The known device that dist.hardware names or starts from; empty: it is not set."""
    hardware = cfg.dist.hardware
    if isinstance(hardware, str):
        return hardware.lower()
    return str((hardware or {}).get("base", "")).lower()
