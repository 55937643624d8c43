"""A job for Kubernetes: an indexed Job with one pod per node, a headless Service for their names, and the user's files
in a ConfigMap, with the modules beside them that they import.

A pod that was preempted or evicted, or whose node was lost, is replaced and does not count as a failure. A mistake, bad
numbers and a last checkpoint that could not be saved end the Job at once, since a new pod would meet them again. Any
other failure counts towards BACKOFF_LIMIT, a node that failed its check too: the new pod may get another node.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_mtp.errors import ConfigError, NotSavedError, NumericsError, cut
from megatron_mtp.launch.environment import is_amd
from megatron_mtp.launch.job import PORT, Job
from megatron_mtp.launch.k8s_patch import merged
from megatron_mtp.launch.neighbours import neighbours
from megatron_mtp.launch.options import CONFIG_PATH
from megatron_mtp.launch.view import Mount, View

CONTAINER = "train"
BACKOFF_LIMIT = 20
"""Failed pods, over all nodes, after which the Job fails."""
CONFIG_MAP_BYTES = 1 << 20
PLAIN_RESOURCES = ("cpu", "memory", "ephemeral-storage", "hugepages-")
"""What every node has; any other resource is a device."""
OF_THE_POD = ("emptyDir", "configMap", "secret", "projected", "downwardAPI")
"""Volumes that end with the pod, or cannot be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a job asks of Kubernetes, in addition to its pods and GPUs.

    Args:
        image: container image with megatron-mtp.
        namespace: None: kubectl's default.
        claim: PersistentVolumeClaim of the shared file system; None: a patch mounts one.
        mount: where the claim is mounted.
        secrets: variable -> SECRET/KEY.
        resources: NAME=AMOUNT of each pod besides its GPUs, requested and at most.
        node_selector: KEY=VALUE labels that a node must have.
        pull_secrets: names of the Secrets that the image needs.
        patches: merged into the Job, in order.
    """

    image: str
    namespace: str | None = None
    claim: str | None = None
    mount: str = "/shared"
    secrets: Mapping[str, str] = field(default_factory=dict)
    resources: Sequence[str] = ()
    node_selector: Sequence[str] = ()
    pull_secrets: Sequence[str] = ()
    patches: Sequence[dict[str, Any]] = ()

    @property
    def options(self) -> dict[str, str | Sequence[str] | None]:
        """The texts as the user gave them, by option."""
        found: dict[str, str | Sequence[str] | None] = {"--image": self.image, "--namespace": self.namespace}
        found |= {"--claim": self.claim, "--mount": self.mount, "--resource": self.resources}
        return found | {"--node-selector": self.node_selector, "--pull-secret": self.pull_secrets}


def manifests(job: Job, request: Request) -> list[dict[str, Any]]:
    """The manifests of a job, the Job last.

    Raises:
        ConfigError: the user's files do not fit into a ConfigMap, are not UTF-8, or import two modules of one name.
    """
    meta = _meta(job, request)
    config = [_config_map(job, meta)] if job.own_files else []
    return [_service(job, meta), *config, job_manifest(job, request)]


def job_manifest(job: Job, request: Request) -> dict[str, Any]:
    """The Job itself, with its patches. Made without the text of the user's files, so that a wrong job has one too."""
    whole = _job(job, _meta(job, request), _pod(job, request, _container(job, request)))
    for patch in request.patches:
        whole = merged(whole, patch)
    return whole


def _meta(job: Job, request: Request) -> dict[str, Any]:
    namespace = {"namespace": request.namespace} if request.namespace else {}
    return {"name": job.name, "labels": {"app": job.name}} | namespace


def _pod(job: Job, request: Request, container: dict[str, Any]) -> dict[str, Any]:
    # NCCL shares memory between the ranks of a node; by default a pod has only 64 MiB of it.
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if request.claim:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": request.claim}})
        mounts.append({"name": "shared", "mountPath": request.mount})
    if job.own_files:
        items = [{"key": key, "path": path} for key, (path, _) in _files(job).items()]
        volumes.append({"name": "config", "configMap": {"name": job.name, "items": items}})
        mounts.append({"name": "config", "mountPath": CONFIG_PATH})
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # a podFailurePolicy requires it; the Job creates a new pod
        "subdomain": job.name,
        "terminationGracePeriodSeconds": job.grace_s,
        "containers": [container | {"volumeMounts": mounts}],
        "volumes": volumes,
    }
    if job.has_gpus:  # nodes with GPUs usually repel pods that need none
        pod["tolerations"] = [{"key": _gpu(job), "operator": "Exists", "effect": "NoSchedule"}]
    if request.node_selector:
        pod["nodeSelector"] = _pairs(request.node_selector)
    if request.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in request.pull_secrets]
    return pod


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE texts as a mapping."""
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def as_text(parts: Sequence[dict[str, Any]]) -> str:
    """The manifests as one YAML text."""
    return yaml.safe_dump_all(parts, sort_keys=False, width=1000)


def view(parts: Sequence[dict[str, Any]]) -> View:
    """What the pods of a job see beside the image: the claim, and a patch's volumes if they outlive the pod."""
    pod = parts[-1]["spec"]["template"]["spec"]
    lost = {volume["name"] for volume in pod.get("volumes", []) if any(kind in volume for kind in OF_THE_POD)}
    mounts = next((one.get("volumeMounts") or [] for one in pod["containers"] if one.get("name") == CONTAINER), [])
    kept = tuple(Mount(mount["mountPath"]) for mount in mounts if mount["name"] not in lost)
    return View(kept, option="--claim and --mount, or a --patch")


def _service(job: Job, meta: dict[str, Any]) -> dict[str, Any]:
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,  # pods must find each other before they are ready
        "selector": {"app": job.name},
        "ports": [{"name": "rendezvous", "port": PORT}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}


def _config_map(job: Job, meta: dict[str, Any]) -> dict[str, Any]:
    files = _files(job)
    data = {key: _text(file) for key, (_, file) in files.items()}
    if (size := sum(len(text.encode()) for text in data.values())) > CONFIG_MAP_BYTES:
        names = ", ".join(str(file) for _, file in files.values())
        raise ConfigError(
            f"{cut(names)}: {size} bytes; the files that travel with a Kubernetes job may have {CONFIG_MAP_BYTES} in "
            "total. Put them into the image, where a recipe and a callback can be named as module:NAME."
        )
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8, and a ConfigMap holds nothing else. Convert it.") from error


def _files(job: Job) -> dict[str, tuple[str, Path]]:
    """Key in the ConfigMap -> path below CONFIG_PATH, and file: the named files, and the neighbours they import."""
    found = {_key(job, file): (_key(job, file), file) for file in job.own_files}
    for path, file in imported_files(job).items():
        found[f"{len(found)}-{_as_key(path)}"] = (path, file)
    return found


def imported_files(job: Job) -> dict[str, Path]:
    """Modules beside the Python files of a job that these import, by their path below CONFIG_PATH.

    Raises:
        ConfigError: two folders have one of the same name; a pod has only one folder for them.
    """
    found: dict[str, Path] = {}
    for file in job.python_files:
        for path, neighbour in neighbours(file).items():
            if found.setdefault(path, neighbour) != neighbour:
                raise ConfigError(
                    f"{neighbour}: the job imports {found[path]} too, and a pod has one folder for both. Rename one, "
                    "or put the files of the job into one folder."
                )
    return found


def _key(job: Job, file: Path) -> str:
    """The name of a file in the ConfigMap; the number keeps files of one name apart."""
    return f"{job.own_files.index(file)}-{_as_key(file.name)}"


def _as_key(path: str) -> str:
    return re.sub("[^-._a-zA-Z0-9]", "_", path)


def _job(job: Job, meta: dict[str, Any], pod: dict[str, Any]) -> dict[str, Any]:
    ends = sorted({ConfigError.exit_code, NumericsError.exit_code, NotSavedError.exit_code})
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": ends}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "Ignore",
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": job.requeued_codes},
        },
    ]
    spec = {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": BACKOFF_LIMIT,
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": {"app": job.name}}, "spec": pod},
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec}


def _container(job: Job, request: Request) -> dict[str, Any]:
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in job.environment.items()]
    for name, place in request.secrets.items():
        secret, _, key = place.partition("/")
        variables.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": request.image,
        "command": ["bash", "-c", _command(job)],
        "env": variables,
    }
    resources = _pairs(request.resources)
    amounts: dict[str, Any] = {**({_gpu(job): job.gpus_per_node} if job.has_gpus else {}), **resources}
    if amounts:
        container["resources"] = {"requests": amounts, "limits": dict(amounts)}
    if any(not name.startswith(PLAIN_RESOURCES) for name in resources):
        # A network device reads and writes memory that the kernel must not move.
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    return container


def _gpu(job: Job) -> str:
    return "amd.com/gpu" if is_amd(job.cfg) else "nvidia.com/gpu"


def _command(job: Job) -> str:
    """What the pod of one node runs: setup, check of the node, ranks."""

    def place(file: Path) -> str:
        return f"{CONFIG_PATH}/{_key(job, file)}"

    rendezvous = job.rendezvous(
        job_id=job.name, first_node=f"{job.name}-0.{job.name}", is_first="$((JOB_COMPLETION_INDEX == 0))"
    )
    folder = job.log_folder
    logs = f'{shlex.quote(folder)}/{job.name}/"$HOSTNAME"' if folder else None
    lines = [f". {shlex.quote(place(job.setup))} || exit {ConfigError.exit_code}"] if job.setup else []
    if preflight := job.preflight(place):
        lines.append(f"{preflight} || exit")
    return "\n".join([*lines, f"exec {job.agent(rendezvous, place, logs)}"])
