"""The form of the options of `launch`: what a scheduler would refuse is refused here, and no text adds a line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from megatron_mtp.errors import Problem

CONFIG_PATH = "/etc/megatron-mtp"
"""Where a pod finds the files that travel with its job."""
MOUNTED = ("/dev/shm", CONFIG_PATH)
"""Paths of a pod that hold something else than the shared file system."""
LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SUBDOMAIN = rf"(?=.{{1,253}}$){LABEL}(\.{LABEL})*"
_SUBDOMAIN_RULE = "must be lower-case letters, digits, '-' and '.', at most 253, with a letter or digit at both ends"
_NAME_PART = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_QUALIFIED = rf"({_SUBDOMAIN}/)?{_NAME_PART}"
_MOUNT_ENTRY = r"/[^:,]*(:/[^:,]*(:[^:,]+)?)?"
# Option -> (form of its value, the form in words). None of them may hold a line break or another control character.
FORMS: dict[str, dict[str, tuple[str, str]]] = {
    "local": {"--logs": (r"/.+", "must be an absolute path")},
    "slurm": {
        "--partition": (r"\S+", "must be a name without spaces"),
        "--account": (r"\S+", "must be a name without spaces"),
        "--time": (r"\S+", "must be a time limit in Slurm's format, such as 24:00:00"),
        "--sbatch": (r"-{0,2}[A-Za-z]\S*.*", "must be one option of sbatch, such as qos=high or exclusive"),
        "--srun": (r"-{0,2}[A-Za-z]\S*.*", "must be one option of srun, such as mpi=none"),
        "--after": (r"[0-9]+(_[0-9]+)?", "must be the number of a job, such as 4711"),
        "--container-image": (r"\S+", "must be the name of an image, or the path of its file"),
        "--container-mounts": (
            rf"{_MOUNT_ENTRY}(,{_MOUNT_ENTRY})*",
            "must be absolute paths as SRC or SRC:DST or SRC:DST:FLAGS, with commas between them",
        ),
        "--logs": (r"/.+", "must be an absolute path"),
    },
    "k8s": {
        "--image": (r"[A-Za-z0-9][\w.:/@+-]*", "must be the name of a container image, such as registry/image:tag"),
        "--namespace": (
            LABEL,
            "must be lower-case letters, digits and '-', at most 63, with no '-' at the beginning or end",
        ),
        "--claim": (_SUBDOMAIN, _SUBDOMAIN_RULE),
        "--mount": (r"/[^:]*[^:/]", "must be an absolute path below /, without ':'"),
        "--resource": (
            rf"{_QUALIFIED}=[0-9]+(\.[0-9]+)?([mkMGTP]|[KMGTP]i)?",
            "must be a resource and its amount, such as cpu=96, memory=900Gi or rdma/hca=8",
        ),
        "--node-selector": (rf"{_QUALIFIED}=({_NAME_PART})?", "must be a label of nodes, as KEY=VALUE"),
        "--pull-secret": (_SUBDOMAIN, _SUBDOMAIN_RULE),
        "--logs": (r"/.+", "must be an absolute path"),
    },
}


def option_problems(kind: str, options: Mapping[str, str | Sequence[str] | None]) -> list[Problem]:
    """Options whose text the scheduler would refuse, or that would add lines to a script.

    Args:
        options: "--name" -> its value or values; None is not given.
    """
    problems = []
    for option, (form, rule) in FORMS.get(kind, {}).items():
        given = options.get(option)
        for text in [given] if isinstance(given, str) else given or ():
            if not text.isprintable():
                problems.append(Problem(fields=(option,), value=text, rule="must be one line of printable characters"))
            elif not re.fullmatch(form, text, re.ASCII):
                problems.append(Problem(fields=(option,), value=text, rule=rule))
            elif option == "--mount" and (rule := _mount_rule(PurePosixPath(text))):
                problems.append(Problem(fields=(option,), value=text, rule=rule, remedy="Use a path such as /shared."))
    return problems


def _mount_rule(path: PurePosixPath) -> str:
    """The rule that a mount path breaks, or nothing."""
    if ".." in path.parts:
        return "must not hold '..'"
    taken = [other for other in map(PurePosixPath, MOUNTED) if path.is_relative_to(other) or other.is_relative_to(path)]
    return f"would hide {taken[0]}, which the pod needs" if taken else ""
