"""The Slurm script is sound shell code, holds what was asked for, and reacts correctly to every exit code."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mtp.errors import ConfigError
from megatron_mtp.launch.container import Container
from megatron_mtp.launch.job import Job
from megatron_mtp.launch.slurm import Request, render
from tests.launch.jobs import OVERRIDES, make_job, make_script

pytestmark = pytest.mark.unit
FULL = Request(
    partition="batch",
    account="proj",
    time="04:00:00",
    cpus_per_node=96,
    sbatch=["qos=high", "--exclusive"],
    srun=["mpi=none", "--comment=two words"],
    secrets={"HF_TOKEN": "/home/me/hf token"},
    after="4711",
)
PYXIS = Container("registry#mtp:1", "/shared,/home/me:/job:ro", "pyxis")
APPTAINER = Container("/images/mtp.sif", "/shared,/home/me:/job:ro", "apptainer")


def lines_of(job: Job, request: Request = FULL) -> list[str]:
    return render(job, request).splitlines()


def srun_of(text: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith("srun ")]
    return shlex.split(line)


def on_nodes(text: str) -> list[str]:
    """What the nodes run, in order."""
    words = shlex.split(text[text.index("code=0") :], comments=True)
    return [after for word, after in itertools.pairwise(words) if word == "on_every_node"]


@pytest.fixture
def jobs(tmp_path: Path) -> list[tuple[Job, Request]]:
    """One job of each kind."""
    setup = tmp_path / "set up.sh"
    setup.write_text("module load cuda\n")
    script = make_script(tmp_path)
    mounted = Container("i", f"/shared,{tmp_path}:/job", "pyxis")
    return [
        (make_job(), Request()),
        (make_job(setup=setup, variables={"NAME": "it's $HOME"}), FULL),
        (make_job(checkpoint__save=None, checkpoint__load=None, dist__node_check=False), Request()),
        (make_job(dist__device="cpu"), Request(container=PYXIS)),
        (make_job(dist__hardware="mi300x"), Request(container=APPTAINER, secrets=FULL.secrets)),
        (script, Request(container=mounted)),
    ]


def test_every_script_passes_shellcheck(tmp_path: Path, jobs: list[tuple[Job, Request]]):
    checker = Path(sys.executable).parent / "shellcheck"
    places = []
    for number, (job, request) in enumerate(jobs):
        text = render(job, request)
        places.append(tmp_path / f"{number}.sbatch")
        places[-1].write_text(text)
        for index, command in enumerate(on_nodes(text)):
            places.append(tmp_path / f"{number}-{index}.sh")
            # The setup file is the user's, the batch script sets first_node, and '$' in a user's text stays one.
            head = "#!/bin/bash\n# shellcheck disable=SC1091,SC2016\nexport first_node="
            places[-1].write_text(f"{head}\n{command}\n")
    done = subprocess.run([checker, *places], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_it_asks_for_what_the_config_says():
    lines = lines_of(make_job(dist__preemption_grace_s=120))
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --signal=TERM@120",
        "#SBATCH --requeue",
        "#SBATCH --partition=batch",
        "#SBATCH --time=04:00:00",
        "#SBATCH --account=proj",
        "#SBATCH --cpus-per-task=96",
        "#SBATCH --qos=high",
        "#SBATCH --exclusive",
        "#SBATCH --dependency=afterok:4711",
    ):
        assert line in lines[: lines.index("set -u")], "Slurm reads no option after a command"
    for line in (
        "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=105",
        "export SRUN_CPUS_PER_TASK=96",
        "HF_TOKEN=$(cat '/home/me/hf token') || exit 2",
        "export HF_TOKEN",
    ):
        assert line in lines
    assert srun_of("\n".join(lines))[:4] == ["srun", "--kill-on-bad-exit=0", "--mpi=none", "--comment=two words"]


def test_it_asks_for_nothing_else():
    text = render(make_job(dist__device="cpu"), Request())
    for word in ("--account", "--partition", "gpus-per-node", "cpus-per", "CPUS_PER", "dependency", "NCCL"):
        assert word not in text


def test_variables_by_device():
    layout = {"model__tensor_model_parallel_size": 2, "train__global_batch_size": 32}
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in lines_of(make_job(dist__hardware="h100", **layout))
    for other in ("b200", "mi300x", None):
        assert "MAX_CONNECTIONS" not in render(make_job(dist__hardware=other, **layout), FULL)
    assert "MAX_CONNECTIONS" not in render(make_job(dist__hardware="h100"), FULL), "one rank for each layer"
    changed = make_job(dist__hardware={"base": "h200"}, variables={"NCCL_DEBUG": "INFO"}, **layout)
    lines = lines_of(changed)
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in lines
    assert "export NCCL_DEBUG=INFO" in lines, "the user's variable wins"
    assert "export NCCL_DEBUG=WARN" not in lines


def test_each_rank_has_a_log():
    (_, agent) = on_nodes(render(make_job(), FULL))
    words = shlex.split(agent)
    folder = words[words.index("--log-dir") + 1]
    assert folder == "/shared/run.logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}/$SLURMD_NODENAME"
    assert words[words.index("--tee") + 1] == "0:3"
    assert "--log-dir /logs/a/ranks/" in render(make_job(logger__log_dir="/logs/a"), FULL)
    assert "--log-dir /mine/" in render(make_job(logger__log_dir="/logs/a", logs="/mine"), FULL)


def test_the_nodes_are_checked_first(tmp_path: Path):
    setup = tmp_path / "setup.sh"
    setup.touch()
    check, agent = on_nodes(render(make_job(setup=setup), FULL))
    begin = f". {setup} || exit 2\nexec python -m "
    assert check.startswith(f"{begin}megatron_mtp doctor --node --gpus 8 tiny_dense -- train.train_iters=50 ")
    assert agent.startswith(f"{begin}megatron_mtp.launch.agent --nproc-per-node 8 ")
    assert len(on_nodes(render(make_job(dist__node_check=False), FULL))) == 1
    assert "--gpus" not in on_nodes(render(make_job(dist__device="cpu"), FULL))[0]


def test_pyxis(tmp_path: Path):
    config = tmp_path / "cluster.yaml"
    config.touch()
    job = make_job([config], variables={"NAME": "value"})
    container = Container("registry#mtp:1", f"/shared,{tmp_path}:/job:ro", "pyxis")
    text = render(job, Request(container=container, secrets={"HF_TOKEN": "/home/me/hf"}))
    words = srun_of(text)
    assert "--container-image=registry#mtp:1" in words
    assert f"--container-mounts=/shared,{tmp_path}:/job:ro" in words
    (kept,) = [word for word in words if word.startswith("--container-env=")]
    assert {"NAME", "HF_TOKEN", "NCCL_DEBUG"} <= set(kept.partition("=")[2].split(","))
    assert all("--config /job/cluster.yaml" in command for command in on_nodes(text)), "its path in the container"
    with pytest.raises(ConfigError, match=r"cluster\.yaml: the container does not see it.*--container-mounts"):
        render(job, Request(container=PYXIS))


def test_apptainer():
    text = render(make_job(), Request(container=APPTAINER, secrets={"HF_TOKEN": "/home/me/hf"}))
    bind = ["--bind", "/shared,/home/me:/job:ro", "/images/mtp.sif", "bash", "-c", "$1"]
    assert srun_of(text)[2:] == ["apptainer", "exec", "--nv", *bind]
    assert 'export APPTAINERENV_HF_TOKEN="$HF_TOKEN"' in text.splitlines()
    amd = srun_of(render(make_job(dist__hardware="mi300x"), Request(container=APPTAINER)))
    assert amd[2:5] == ["apptainer", "exec", "--rocm"]
    cpu = srun_of(render(make_job(dist__device="cpu"), Request(container=APPTAINER)))
    assert cpu[2:5] == ["apptainer", "exec", "--bind"]


def test_a_script_is_started_by_the_agent(tmp_path: Path):
    job = make_script(tmp_path)
    check, agent = on_nodes(render(job, Request()))
    assert shlex.split(check)[1:] == ["python", "-m", "megatron_mtp", "doctor", "--node", "--gpus", "8"]
    assert shlex.split(agent)[-3:] == [str(job.script), "--rate", "it's 3"]


@pytest.mark.parametrize(
    ("code", "is_requeued"), [(0, False), (1, False), (2, False), (3, True), (4, False), (6, False), (143, True)]
)
def test_only_a_preemption_is_requeued(tmp_path: Path, code: int, is_requeued: bool):
    """The script runs with stand-ins for Slurm's commands: srun runs its argument, python records its arguments."""
    done = run_with_stand_ins(tmp_path, f'[ "$4" = doctor ] || [ "$3" = doctor ] || exit {code}')
    assert done.returncode == code, done.stderr
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 77\n" if is_requeued else "")
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "node7:29477", "a port of the job's own"
    assert arguments[arguments.index("--rdzv-id") + 1] == "77.0"
    assert arguments[arguments.index("--rdzv-conf") + 1].startswith("is_host=1,")
    assert arguments[arguments.index("--log-dir") + 1] == "/shared/run.logs/77.0/node7"
    assert arguments[arguments.index("--log-line-prefix-template") + 1] == "[rank ${rank}] "
    assert arguments[-len(OVERRIDES) :] == OVERRIDES, "quoting survives two shells"


@pytest.mark.parametrize("code", [2, 7])
def test_no_ranks_start_after_a_failed_check(tmp_path: Path, code: int):
    done = run_with_stand_ins(tmp_path, f"exit {code}")
    assert done.returncode == code
    assert not (tmp_path / "requeued").exists()
    assert "megatron_mtp.launch.agent" not in (tmp_path / "arguments").read_text()


def run_with_stand_ins(folder: Path, python_ends_with: str) -> subprocess.CompletedProcess[str]:
    programs = {
        "srun": 'shift; SLURM_NODEID=0 SLURMD_NODENAME=node7 exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> {folder}/requeued; fi',
        "python": f'for word in "$@"; do echo "$word" >> {folder}/arguments; done; '
        f"kill -TERM $TEST_SHELL; {python_ends_with}",
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    script = f"export TEST_SHELL=$$\n{render(make_job(), FULL_WITHOUT_SECRETS)}"
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    return subprocess.run(
        ["bash", "-c", script], env=environment, check=False, timeout=60, capture_output=True, text=True
    )


FULL_WITHOUT_SECRETS = Request(partition="batch", time="04:00:00")


def test_a_secret_that_cannot_be_read_ends_the_job(tmp_path: Path):
    text = render(make_job(), Request(secrets={"HF_TOKEN": str(tmp_path / "none")}))
    done = subprocess.run(["bash", "-c", text], check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such file" in done.stderr
