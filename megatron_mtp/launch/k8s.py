"""A job for Kubernetes: an indexed Job with one pod per node, a headless Service for their names, and the config files
with the file of a recipe of one's own.

A pod that was preempted or evicted, or whose node was lost, is replaced and does not count as a failure. A mistake, bad
numbers and a last checkpoint that could not be saved end the Job at once, since a new pod would meet them again. Any
other failure counts towards BACKOFF_LIMIT.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from megatron_mtp.errors import ConfigError, NotSavedError, NumericsError
from megatron_mtp.launch.job import CONFIG_PATH, PORT, Job
from megatron_mtp.recipes.own import recipe_file

CONTAINER = "train"
RECIPE_NAME = "recipe.py"
"""Name in the pod of the file of a recipe of one's own; its neighbours are not there."""
BACKOFF_LIMIT = 20
"""Failed pods, over all nodes, after which the Job fails."""


def render(job: Job, *, image: str, namespace: str | None, claim: str | None, mount: str) -> str:
    """The manifests as one YAML text.

    Args:
        image: container image with megatron-mtp.
        namespace: None: kubectl's default.
        claim: PersistentVolumeClaim of the shared file system; None: the image or the cluster mounts it.
        mount: where the claim is mounted.
    """
    meta = {"name": job.name, "labels": {"app": job.name}} | ({"namespace": namespace} if namespace else {})
    parts = [_service(job, meta)]
    data = {f"{index}.yaml": file.read_text(encoding="utf-8") for index, file in enumerate(job.files)}
    if recipe := recipe_file(job.recipe):
        data[RECIPE_NAME] = recipe.read_text(encoding="utf-8")
        function = job.recipe.rpartition(":")[2]
        job = replace(job, recipe=f"{CONFIG_PATH}/{RECIPE_NAME}:{function}")
    if data:
        parts.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})
    parts.append(_job(job, meta, _pod(job, image, claim, mount, has_files=bool(data))))
    return yaml.safe_dump_all(parts, sort_keys=False, width=1000)


def _service(job: Job, meta: dict[str, Any]) -> dict[str, Any]:
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,  # pods must find each other before they are ready
        "selector": {"app": job.name},
        "ports": [{"name": "rendezvous", "port": PORT}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}


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


def _pod(job: Job, image: str, claim: str | None, mount: str, *, has_files: bool) -> dict[str, Any]:
    # NCCL shares memory between the ranks of a node; by default a pod has only 64 MiB of it.
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if claim:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "shared", "mountPath": mount})
    if has_files:
        volumes.append({"name": "config", "configMap": {"name": job.name}})
        mounts.append({"name": "config", "mountPath": CONFIG_PATH})
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": image,
        "command": ["bash", "-c", f"exec {job.agent(_rendezvous(job), _places(job))}"],
        "env": [{"name": name, "value": value} for name, value in job.environment.items()],
        "volumeMounts": mounts,
    }
    if job.has_gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": job.gpus_per_node}}
    return {
        "restartPolicy": "Never",  # a podFailurePolicy requires it; the Job creates a new pod
        "subdomain": job.name,
        "terminationGracePeriodSeconds": job.grace_s,
        "containers": [container],
        "volumes": volumes,
    }


def _rendezvous(job: Job) -> list[str]:
    return job.rendezvous(
        job_id=job.name, first_node=f"{job.name}-0.{job.name}", is_first="$((JOB_COMPLETION_INDEX == 0))"
    )


def _places(job: Job) -> list[str]:
    return [f"{CONFIG_PATH}/{index}.yaml" for index in range(len(job.files))]
