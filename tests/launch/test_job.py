"""Rendered jobs are valid and complete, and the Slurm script reacts correctly to every exit code."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_mtp.cli.launch import _submit
from megatron_mtp.errors import ConfigError
from megatron_mtp.launch import k8s, slurm
from megatron_mtp.launch.job import Job, check_job, job_problems, option_problems
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit
OVERRIDES = [
    "train.train_iters=50",
    'model.mtp_loss_scaling_factor="0.3@0,0.1@10T"',
    "logger.wandb_exp_name=it's $HOME",
]


def make_job(files: list[Path] | None = None, nodes: int = 2, name: str = "tiny-dense", **dist: object) -> Job:
    cfg = get_recipe("tiny_dense")
    cfg.checkpoint.save = cfg.checkpoint.load = "/shared/run"
    cfg.dist.device = "cuda"
    cfg.train.global_batch_size = 32
    for field, value in dist.items():
        setattr(cfg.dist, field, value)
    cfg.finalize(nodes * 8)
    return Job(cfg, "tiny_dense", files or [], OVERRIDES, name, nodes, 8, 3)


def script_of(job: Job) -> str:
    return slurm.render(job, partition="batch", account=None, time="04:00:00")


def test_the_slurm_script_is_bash_and_asks_for_what_the_config_says(tmp_path: Path):
    text = script_of(make_job(preemption_grace_s=120))
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=True).stderr == ""
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --signal=TERM@120",
        "#SBATCH --requeue",
        "#SBATCH --partition=batch",
        "#SBATCH --time=04:00:00",
        "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=105",
    ):
        assert line in text.splitlines()
    assert "account" not in text
    assert "gpus-per-node" not in script_of(make_job(device="cpu"))
    assert "cpus-per" not in text.lower()


def test_the_slurm_script_takes_cores_and_what_a_cluster_asks_for():
    options = {"partition": None, "account": None, "time": None}
    text = slurm.render(make_job(), **options, cpus_per_node=96, more=["qos=high", "--exclusive"])
    assert "export SRUN_CPUS_PER_TASK=96" in text.splitlines()
    for line in ("#SBATCH --cpus-per-task=96", "#SBATCH --qos=high", "#SBATCH --exclusive"):
        assert line in text.splitlines()[: text.splitlines().index("set -u")], "Slurm reads no option after a command"


@pytest.mark.parametrize(
    ("code", "is_requeued"), [(0, False), (1, False), (2, False), (3, True), (4, False), (6, False), (143, True)]
)
def test_only_a_preemption_is_requeued(tmp_path: Path, code: int, is_requeued: bool):
    """The script runs with stand-ins for Slurm's commands: srun runs its argument, python records its arguments."""
    programs = {
        "srun": 'shift; SLURM_NODEID=0 exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> {tmp_path}/requeued; fi',
        "python": f'for word in "$@"; do echo "$word" >> {tmp_path}/arguments; done; '
        f"kill -TERM $TEST_SHELL; exit {code}",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = f"export TEST_SHELL=$$\n{script_of(make_job())}"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    assert subprocess.run(["bash", "-c", script], env=environment, check=False, timeout=60).returncode == code
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 77\n" if is_requeued else "")
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "node7:29477", "a port of the job's own"
    assert arguments[arguments.index("--rdzv-id") + 1] == "77.0"
    assert arguments[arguments.index("--rdzv-conf") + 1].startswith("is_host=1,")
    assert arguments[-len(OVERRIDES) :] == OVERRIDES, "quoting survives two shells"


def test_the_kubernetes_job(tmp_path: Path):
    overlay = tmp_path / "cluster.yaml"
    overlay.write_text("train:\n  manual_gc: true\n")
    text = k8s.render(make_job([overlay]), image="registry/mtp:1", namespace="ml", claim="disk", mount="/shared")
    service, config, job = yaml.safe_load_all(text)
    assert (service["kind"], config["kind"], job["kind"]) == ("Service", "ConfigMap", "Job")
    assert config["data"] == {"0.yaml": overlay.read_text()}
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    rules = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules == {"FailJob": [2, 4, 6], "Ignore": [3, 143]}
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 300
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    words = shlex.split(container["command"][2])
    assert "tiny-dense-0.tiny-dense:29400" in words
    assert words[words.index("--config") + 1] == "/etc/megatron-mtp/0.yaml"
    assert words[-len(OVERRIDES) :] == OVERRIDES
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert spec["template"]["metadata"]["labels"] == service["spec"]["selector"]


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("slurm", {"load": None}, "must resume from what it saved"),
        ("slurm", {"save": "run", "load": "run"}, "must be absolute"),
        ("k8s", {"name": "Tiny_dense"}, "lower-case"),
        ("slurm", {"name": "a b"}, "use letters"),
        ("local", {}, "this machine only"),
        ("slurm", {"grace": 20}, "must be at least 30"),
    ],
)
def test_what_would_lose_work_is_refused(kind: str, change: dict, said: str):
    cfg = get_recipe("tiny_dense")
    cfg.checkpoint.save, cfg.checkpoint.load = change.get("save", "/shared/run"), change.get("load", "/shared/run")
    cfg.dist.preemption_grace_s = change.get("grace", 300)
    job = Job(cfg, "tiny_dense", [], [], change.get("name", "tiny"), 2, 8, 3)
    assert [problem for problem in job_problems(job, kind) if said in problem]
    with pytest.raises(ConfigError):
        check_job(job, kind, {})


def test_a_sound_job_is_accepted():
    assert job_problems(make_job(), "slurm") == job_problems(make_job(), "k8s") == []
    assert job_problems(make_job(nodes=1), "local") == []


SLURM = ("--partition", "--account", "--time", "--sbatch")
KUBERNETES = ("--image", "--namespace", "--claim", "--mount")


@pytest.mark.parametrize("option", SLURM + KUBERNETES)
@pytest.mark.parametrize("text", ["x\ntouch F", "x\rtouch F", "\n", "x\0", "x\u2028y", "", " ", "\t"])
def test_no_option_adds_a_line_or_is_empty(option: str, text: str):
    kind = "slurm" if option in SLURM else "k8s"
    given = [text] if option == "--sbatch" else text
    (found,) = option_problems(kind, {option: given})
    assert found.fields == (option,)
    assert found.value == text
    assert option_problems("local", {option: given}) == []


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
    with pytest.raises(ConfigError, match=f"^{option} = ") as caught:
        check_job(make_job(), "k8s", {option: text})
    assert said in str(caught.value)


def test_sound_options_are_accepted():
    slurm_options = {"--partition": "gpu,big", "--account": "proj-1", "--time": "1-00:00:00"}
    more = ["qos=high", "--exclusive", "-C a100", "--comment='two words'", "mem=0"]
    assert option_problems("slurm", slurm_options | {"--sbatch": more}) == []
    for image in ("i", "registry/mtp:1", "ghcr.io:5000/a/b_c@sha256:0f", "nvcr.io/nvidia/pytorch:25.01-py3"):
        options = {"--image": image, "--namespace": "ml-1", "--claim": "disk.a", "--mount": "/shared/x y"}
        assert option_problems("k8s", options) == []
    assert option_problems("k8s", dict.fromkeys(KUBERNETES)) == []


def test_without_the_scheduler_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="sbatch: there is no such command on this machine"):
        _submit("", ["sbatch"], dry_run=False)


def command(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "megatron_mtp", "launch", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)


RUN = ("checkpoint.save=/shared/run", "checkpoint.load=/shared/run")


def test_the_command_prints_and_validates():
    done = command("slurm", "tiny_dense", "--nodes", "2", "--gpus-per-node", "2", "--dry-run", *RUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    done = command("k8s", "tiny_dense", "--nodes", "2", "--gpus-per-node", "2", "--image", "i", "--dry-run", *RUN)
    assert len(list(yaml.safe_load_all(done.stdout))) == 2
    done = command(
        "slurm", "tiny_dense", "--nodes", "2", "--gpus-per-node", "2", "--dry-run", *RUN, "model.num_layers=x"
    )
    assert done.returncode == 2
    assert "model.num_layers = 'x'" in done.stderr
    lines = ["--partition", "x\ntouch F", "--sbatch", "qos=\ntouch G"]
    done = command("slurm", "tiny_dense", "--nodes", "2", "--gpus-per-node", "2", "--dry-run", *RUN, *lines)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--partition = 'x\\ntouch F'" in done.stderr
    assert "--sbatch = 'qos=\\ntouch G'" in done.stderr
    done = command("slurm", "tiny_dense", "--nodes", "3", "--gpus-per-node", "1", "--dry-run", *RUN)
    assert done.returncode == 2
    assert "train.global_batch_size" in done.stderr


def local(folder: Path, *options: str) -> subprocess.CompletedProcess:
    run = [f"checkpoint.save={folder}/run", f"checkpoint.load={folder}/run", "dist.device=cpu", "dist.num_threads=1"]
    run += ["train.train_iters=2", "validation.eval_iters=0"]
    return command("local", "tiny_dense", "--gpus-per-node", "2", *options, *run)


def test_local_prints_its_command(tmp_path: Path):
    done = local(tmp_path, "--dry-run")
    agent = "python -m megatron_mtp.launch.agent --nproc-per-node 2 --max-restarts 3 --standalone "
    begin = f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=285 {agent}-m megatron_mtp pretrain tiny_dense -- checkpoint.save="
    assert done.stdout.startswith(begin)


@pytest.mark.slow
@pytest.mark.dist
def test_local_trains(tmp_path: Path):
    done = local(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "iter_0000002").is_dir()
