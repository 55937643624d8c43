"""What is refused before a job is submitted, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mtp.errors import ConfigError
from megatron_mtp.launch.container import Container
from megatron_mtp.launch.environment import SECRET_FORMS, read_secrets, read_variables
from megatron_mtp.launch.hints import job_hints
from megatron_mtp.launch.job import Job, job_problems
from megatron_mtp.launch.options import option_problems
from megatron_mtp.launch.view import View, path_hints, path_problems
from megatron_mtp.recipes import get_recipe
from tests.launch.jobs import make_job, make_script

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("slurm", {"load": None}, "must resume from what it saved"),
        ("slurm", {"load": "/shared/other@30"}, "copy the folder of its checkpoint"),
        ("k8s", {"name": "Tiny_dense"}, "lower-case"),
        ("slurm", {"name": "a b"}, "use letters"),
        ("slurm", {"grace": 20}, "must be at least 30"),
        ("slurm", {"mock": False}, "dataset.blend: is not set, so the job would train on random tokens"),
        ("k8s", {"mock": False}, "dataset.mock=true"),
        ("slurm", {"files": [Path("/none.yaml")]}, "/none.yaml: there is no such file"),
    ],
)
def test_what_would_lose_work_is_refused(kind: str, change: dict, said: str):
    cfg = get_recipe("tiny_dense")
    cfg.checkpoint.save, cfg.checkpoint.load = "/shared/run", change.get("load", "/shared/run")
    cfg.dist.preemption_grace_s = change.get("grace", 300)
    cfg.dataset.mock = change.get("mock", True)
    name, files = change.get("name", "tiny"), change.get("files", [])
    job = Job(cfg=cfg, recipe="tiny_dense", files=files, name=name, nodes=2, gpus_per_node=8)
    (problem,) = job_problems(job, kind)
    assert said in str(problem)


def test_a_sound_job_is_accepted(tmp_path: Path):
    for kind in ("slurm", "k8s"):
        assert job_problems(make_job(), kind) == []
    assert job_problems(make_job(nodes=1, dataset__mock=False), "local") == []
    assert job_problems(make_script(tmp_path), "slurm") == []


CONTAINER = Container("i", "/shared,/scratch/data:/data:ro").view


@pytest.mark.parametrize(
    ("fields", "view", "said"),
    [
        ({"checkpoint__save": "run", "checkpoint__load": "run"}, View(), "checkpoint.save = 'run': must be absolute"),
        ({"logger__tensorboard_dir": "tb"}, View(), "logger.tensorboard_dir = 'tb': must be absolute"),
        ({"dataset__valid_sets": {"a": ["data/a"]}}, View(), "dataset.valid_sets = 'data/a': must be absolute"),
        ({"tokenizer__tokenizer_model": "t.json"}, View(), "tokenizer.tokenizer_model = 't.json': must be absolute"),
        ({"logger__tensorboard_dir": "/scratch/tb"}, CONTAINER, "on the container's own disk"),
        ({"logs": "/sharedlogs"}, CONTAINER, "--logs = '/sharedlogs': is on the container's own disk"),
        ({"profiling__profile_dir": "/shared/../p"}, CONTAINER, "with --container-mounts"),
    ],
)
def test_paths_that_the_job_would_miss_are_refused(fields: dict, view: View, said: str):
    problems = path_problems(make_job(**fields), view)
    assert said in str(problems[0])
    assert len({problem.fields for problem in problems}) <= 3


def test_paths_that_the_job_finds_are_accepted():
    fields = {"dataset__blend": ["/data/web"], "dataset__mock": False, "logger__tensorboard_dir": "/data/tb"}
    assert path_problems(make_job(**fields), View()) == []
    assert path_problems(make_job(**fields), CONTAINER) == []


def test_data_is_looked_for_where_the_container_has_it(tmp_path: Path):
    for end in ("bin", "idx"):
        (tmp_path / f"web.{end}").touch()
    job = make_job(dataset__blend=["/data/web"], dataset__mock=False, dataset__valid_sets={"a": ["/data/books"]})
    view = Container("i", f"/shared,{tmp_path}:/data").view
    assert list(path_hints(job, view)) == [
        f"dataset.valid_sets = /data/books: this machine sees no {tmp_path}/books.bin. The nodes must."
    ]
    job = make_job(dataset__blend=[f"{tmp_path}/web"], dataset__mock=False)
    assert list(path_hints(job, View())) == []
    assert "the image must hold it" in next(path_hints(job, view))
    masked = make_job(dataset__blend=[f"{tmp_path}/web"], dataset__mock=False, dataset__loss_mask_suffix="_mask")
    assert "web_mask.bin" in next(path_hints(masked, View()))


def test_a_checkpoint_by_name_is_looked_for_in_its_run(tmp_path: Path):
    for name in (f"{tmp_path}@best", f"{tmp_path}@200", str(tmp_path)):
        assert list(path_hints(make_job(checkpoint__pretrained_checkpoint=name), View())) == []
    (said,) = path_hints(make_job(checkpoint__pretrained_checkpoint=f"{tmp_path}/none@best"), View())
    assert said.startswith(f"checkpoint.pretrained_checkpoint = {tmp_path}/none@best: this machine sees no")


def test_hints(tmp_path: Path):
    found = job_hints(make_job(model__mtp_num_layers=3), "slurm", View(), {})
    assert any("published pretraining runs use 1 or 2 depths" in hint for hint in found), "what `show` says"
    assert any(hint.startswith("dist.hardware is not set") for hint in found)
    found = job_hints(make_script(tmp_path), "slurm", View(), {})
    assert any("its config is checked when it runs" in hint for hint in found)


def test_variables():
    environ = {"HERE": "it's here", "HF_TOKEN": "hf_abc"}
    assert read_variables(["A=1=2", "HERE", "B="], environ, "x") == {"A": "1=2", "HERE": "it's here", "B": ""}
    assert read_variables(["HF_TOKEN"], environ) == {"HF_TOKEN": "hf_abc"}, "written nowhere"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1A=2", "must be NAME=VALUE"),
        ("A B=2", "must be NAME=VALUE"),
        ("=2", "must be NAME=VALUE"),
        ("NONE", "is not set here"),
        ("A=x\ny", "one line"),
        ("HF_TOKEN", "Use --secret HF_TOKEN="),
        ("WANDB_API_KEY=12", "looks like a secret"),
        ("PROXY=http://me:pw@host/", "looks like a secret"),
    ],
)
def test_variables_that_are_refused(text: str, said: str):
    with pytest.raises(ConfigError, match=said) as caught:
        read_variables([text], {"HF_TOKEN": "hf_abc"}, SECRET_FORMS["slurm"][1])
    assert "hf_abc" not in str(caught.value)


def test_secrets():
    assert read_secrets(["A=/home/me/a b"], "slurm") == {"A": "/home/me/a b"}
    assert read_secrets(["A=hub/token.1"], "k8s") == {"A": "hub/token.1"}
    for kind, text in [("slurm", "A"), ("slurm", "A=a"), ("slurm", "A=/a\nb"), ("k8s", "A=hub"), ("k8s", "a b=hub/x")]:
        with pytest.raises(ConfigError, match=r"^--secret = "):
            read_secrets([text], kind)


SLURM = ("--partition", "--account", "--time", "--sbatch", "--srun", "--after", "--container-image")
SLURM += ("--container-mounts", "--logs")
KUBERNETES = ("--image", "--namespace", "--claim", "--mount", "--resource", "--node-selector", "--pull-secret")
SEVERAL = ("--sbatch", "--srun", "--resource", "--node-selector", "--pull-secret")


@pytest.mark.parametrize("option", SLURM + KUBERNETES)
@pytest.mark.parametrize("text", ["x\ntouch F", "x\rtouch F", "\n", "x\0", "x\u2028y", "", " ", "\t"])
def test_no_option_adds_a_line_or_is_empty(option: str, text: str):
    kind = "slurm" if option in SLURM else "k8s"
    given = [text] if option in SEVERAL else text
    (found,) = option_problems(kind, {option: given})
    assert found.fields == (option,)
    assert found.value == text


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("--namespace", "A B", "lower-case"),
        ("--namespace", "-x", "lower-case"),
        ("--namespace", "x" * 64, "at most 63"),
        ("--image", "a b", "container image"),
        ("--claim", "../x", "lower-case"),
        ("--claim", "a..b", "lower-case"),
        ("--claim", ("a" * 60 + ".") * 4 + "a" * 60, "at most 253"),
        ("--pull-secret", "A", "lower-case"),
        ("--resource", "cpu", "such as cpu=96"),
        ("--resource", "memory=900gb", "such as cpu=96"),
        ("--node-selector", "gpu", "KEY=VALUE"),
        ("--mount", "relative", "absolute path"),
        ("--mount", "/", "absolute path"),
        ("--mount", "/a:b", "without ':'"),
        ("--mount", "/dev/shm", "would hide /dev/shm"),
        ("--mount", "/dev/shm/x", "would hide /dev/shm"),
        ("--mount", "/dev", "would hide /dev/shm"),
        ("--mount", "/etc", "would hide /etc/megatron-mtp"),
        ("--mount", "/a/../dev/shm", "'..'"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused(option: str, text: str, said: str):
    (found,) = option_problems("k8s", {option: [text] if option in SEVERAL else text})
    assert str(found).startswith(f"{option} = ")
    assert said in str(found)


def test_sound_options_are_accepted():
    slurm_options = {"--partition": "gpu,big", "--account": "proj-1", "--time": "1-00:00:00", "--after": "12_3"}
    slurm_options |= {"--container-image": "nvcr.io#nvidia/pytorch:26.01-py3", "--logs": "/shared/logs of a"}
    more = ["qos=high", "--exclusive", "-C a100", "--comment='two words'", "mem=0"]
    assert option_problems("slurm", slurm_options | {"--sbatch": more, "--srun": more}) == []
    for mounts in ("/a", "/a:/b", "/a:/b:ro", "/a b,/c:/d:ro+rprivate,/e"):
        assert option_problems("slurm", {"--container-mounts": mounts}) == []
    for mounts in ("a:/b", "/a:b", "/a,", "/a::ro"):
        assert option_problems("slurm", {"--container-mounts": mounts})
    for image in ("i", "registry/mtp:1", "ghcr.io:5000/a/b_c@sha256:0f", "nvcr.io/nvidia/pytorch:25.01-py3"):
        options = {"--image": image, "--namespace": "ml-1", "--claim": "disk.a", "--mount": "/shared/x y"}
        assert option_problems("k8s", options) == []
    several = {
        "--resource": ["cpu=96", "memory=1.5Ti", "rdma/hca_a=1", "vpc.amazonaws.com/efa=32", "hugepages-2Mi=5Gi"],
        "--node-selector": ["a=b", "topology.kubernetes.io/zone=eu-1", "pool="],
        "--pull-secret": ["registry"],
    }
    assert option_problems("k8s", several) == []
    assert option_problems("k8s", dict.fromkeys(KUBERNETES)) == []
