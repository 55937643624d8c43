"""The Kubernetes manifests fit the schema of their kinds, and hold what was asked for."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from megatron_mtp.errors import ConfigError
from megatron_mtp.launch import k8s
from megatron_mtp.launch.job import Job
from megatron_mtp.launch.k8s import Request, as_text, manifests
from megatron_mtp.launch.k8s_patch import merged, read_patch
from megatron_mtp.launch.view import path_problems
from tests.launch.jobs import OVERRIDES, make_job, make_script

pytestmark = pytest.mark.unit
VERSIONS = ("1.31", "1.37")
"""podFailurePolicy is stable since 1.31."""
FULL = Request(
    image="registry/mtp:1",
    namespace="ml",
    claim="disk",
    secrets={"WANDB_API_KEY": "wandb/api-key"},
    resources=["cpu=96", "memory=900Gi", "rdma/hca=8"],
    node_selector=["gpu=h100", "zone="],
    pull_secrets=["registry"],
    patches=[
        {
            "metadata": {"annotations": {"team": "a"}},
            "spec": {
                "backoffLimit": 3,
                "template": {
                    "spec": {
                        "priorityClassName": "high",
                        "tolerations": [{"key": "spot", "operator": "Exists"}],
                        "volumes": [{"name": "data", "nfs": {"server": "s", "path": "/d"}}],
                        "containers": [{"name": "train", "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
                    }
                },
            },
        }
    ],
)


def job_of(job: Job, request: Request = FULL) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Job, pod and container."""
    whole = list(yaml.safe_load_all(as_text(manifests(job, request))))[-1]
    pod = whole["spec"]["template"]["spec"]
    return whole, pod, pod["containers"][0]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_fits_the_schema(tmp_path: Path, version: str):
    file = tmp_path / "a b.yaml"
    file.write_text("train: {}\n")
    jobs = [
        make_job(),
        make_job([file], setup=file, variables={"A": "1"}),
        make_job(dist__device="cpu"),
        make_script(tmp_path),
    ]
    for job in jobs:
        for request in (Request(image="i"), FULL):
            for part in yaml.safe_load_all(as_text(manifests(job, request))):
                kubernetes_validate.validate(part, version, strict=True)
    whole, _, container = job_of(make_job())
    for change in (lambda: whole["spec"].update(nodes=2), lambda: container.update(env=[{"title": "x"}])):
        change()
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(whole, version, strict=True)


def test_the_job(tmp_path: Path):
    overlay = tmp_path / "cluster.yaml"
    overlay.write_text("train:\n  manual_gc: true\n")
    service, config, _ = manifests(make_job([overlay]), FULL)
    assert (service["kind"], config["kind"]) == ("Service", "ConfigMap")
    assert config["data"] == {"0-cluster.yaml": overlay.read_text()}
    whole, pod, container = job_of(make_job([overlay]))
    spec = whole["spec"]
    assert (whole["kind"], spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Job", "Indexed", 2, 2)
    codes = [rule for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in codes}
    assert rules == {"FailJob": [2, 4, 6], "Ignore": [3, 143]}
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 300)
    check, agent = container["command"][2].splitlines()
    assert check.startswith("python -m megatron_mtp doctor --node --gpus 8 tiny_dense --config /etc/megatron-mtp/0-")
    assert check.endswith(" || exit")
    words = shlex.split(agent)
    assert "tiny-dense-0.tiny-dense:29400" in words
    assert words[words.index("--config") + 1] == "/etc/megatron-mtp/0-cluster.yaml"
    assert words[words.index("--log-dir") + 1] == "/shared/run.logs/tiny-dense/$HOSTNAME"
    assert words[-len(OVERRIDES) :] == OVERRIDES
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert spec["template"]["metadata"]["labels"] == service["spec"]["selector"]


def test_what_a_pod_asks_for():
    whole, pod, container = job_of(make_job(variables={"NCCL_IB_HCA": "mlx5"}))
    amounts = {"nvidia.com/gpu": 8, "cpu": "96", "memory": "900Gi", "rdma/hca": "8"}
    assert container["resources"] == {"requests": amounts, "limits": amounts}
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["NCCL_IB_HCA"]["value"] == "mlx5"
    assert variables["WANDB_API_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "wandb", "key": "api-key"}}
    assert pod["nodeSelector"] == {"gpu": "h100", "zone": ""}
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists"},
    ]
    assert (whole["spec"]["backoffLimit"], whole["metadata"]["annotations"]) == (3, {"team": "a"})


def test_what_a_pod_does_not_ask_for():
    _, pod, container = job_of(make_job(dist__device="cpu"), Request(image="i"))
    assert not {"resources", "securityContext"} & set(container)
    assert not {"tolerations", "nodeSelector", "imagePullSecrets"} & set(pod)
    _, pod, container = job_of(make_job(dist__hardware="mi300x"), Request(image="i", resources=["cpu=8"]))
    assert container["resources"]["limits"] == {"amd.com/gpu": 8, "cpu": "8"}
    assert pod["tolerations"][0]["key"] == "amd.com/gpu"
    assert "securityContext" not in container


def test_the_users_files_travel_with_the_job(tmp_path: Path):
    recipe, setup = tmp_path / "recipe.py", tmp_path / "setup.sh"
    recipe.write_text("# recipe")
    setup.write_text("# setup")
    job = make_job(recipe=f"{recipe}:mine", setup=setup)
    assert manifests(job, FULL)[1]["data"] == {"0-setup.sh": "# setup", "1-recipe.py": "# recipe"}
    first, check, agent = job_of(job)[2]["command"][2].splitlines()
    assert first == ". /etc/megatron-mtp/0-setup.sh || exit 2"
    assert "/etc/megatron-mtp/1-recipe.py:mine" in shlex.split(check)
    assert "/etc/megatron-mtp/1-recipe.py:mine" in shlex.split(agent)


def test_a_script_travels_with_the_job(tmp_path: Path):
    job = make_script(tmp_path)
    assert list(manifests(job, FULL)[1]["data"]) == ["0-my_train.py"]
    check, agent = job_of(job)[2]["command"][2].splitlines()
    assert check == "python -m megatron_mtp doctor --node --gpus 8 || exit"
    assert shlex.split(agent)[-3:] == ["/etc/megatron-mtp/0-my_train.py", "--rate", "it's 3"]


def test_files_that_are_too_large_are_refused(tmp_path: Path):
    file = tmp_path / "large.yaml"
    file.write_text("#" * (1 << 20) + "\n")
    with pytest.raises(ConfigError, match=r"large\.yaml: 1048577 bytes"):
        manifests(make_job([file]), FULL)


@pytest.mark.parametrize(
    ("request_", "save", "is_refused"),
    [
        (Request(image="i"), "/shared/run", True),
        (Request(image="i", claim="disk"), "/shared/run", False),
        (Request(image="i", claim="disk"), "/other/run", True),
        (Request(image="i", claim="disk"), "/dev/shm/run", True),
        (Request(image="i", claim="disk"), "/shared", True),
        (Request(image="i", claim="disk", mount="/other"), "/other/run", False),
        (FULL, "/data/run", False),
    ],
)
def test_without_a_shared_disk_it_is_refused(request_: Request, save: str, is_refused: bool):
    job = make_job(checkpoint__save=save, checkpoint__load=save)
    problems = path_problems(job, k8s.view(manifests(job, request_)))
    assert bool(problems) == is_refused
    assert all("on the container's own disk" in problem.rule for problem in problems)


@pytest.mark.parametrize(
    ("whole", "patch", "result"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({}, {"a": {"b": None, "c": 1}}, {"a": {"c": 1}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": [{"name": "x", "v": 1}]}, {"a": [{"name": "x", "v": 2}]}, {"a": [{"name": "x", "v": 2}]}),
        ({"a": [{"name": "x"}]}, {"a": [{"key": "y"}]}, {"a": [{"name": "x"}, {"key": "y"}]}),
        (
            {"volumeMounts": [{"name": "d", "mountPath": "/a"}]},
            {"volumeMounts": [{"name": "d", "mountPath": "/b"}]},
            {"volumeMounts": [{"name": "d", "mountPath": "/a"}, {"name": "d", "mountPath": "/b"}]},
        ),
    ],
)
def test_a_patch_is_merged(whole: dict[str, Any], patch: dict[str, Any], result: dict[str, Any]):
    before = yaml.safe_dump(whole)
    assert merged(whole, patch) == result
    assert yaml.safe_dump(whole) == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: None, "cannot be read"),
        (lambda file: file.write_text("- a\n"), "must hold a part of the Job"),
        (lambda file: file.write_text("a: [\n"), "patch.yaml"),
    ],
)
def test_a_patch_that_is_none_is_refused(tmp_path: Path, make: Callable[[Path], object], said: str):
    make(tmp_path / "patch.yaml")
    with pytest.raises(ConfigError, match=said):
        read_patch(tmp_path / "patch.yaml")
