"""`megatron-mtp launch` as typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_mtp.cli.launch_job import submit
from megatron_mtp.cli.main import main
from megatron_mtp.errors import ConfigError

pytestmark = pytest.mark.unit
SIZES = ("--nodes", "2", "--gpus-per-node", "2", "--dry-run")
RUN = ("checkpoint.save=/shared/run", "checkpoint.load=/shared/run", "dataset.mock=true")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]):
    """Runs `launch` in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["launch", *arguments])
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return run


def test_it_prints_the_job_and_hints_beside_it(command):
    code, out, err = command("slurm", "tiny_dense", *SIZES, *RUN, "--chain", "3", "model.mtp_num_layers=3")
    assert (code, out[:12]) == (0, "#!/bin/bash\n")
    assert sys.executable in out
    assert "hint: model.mtp_num_layers = 3: published pretraining runs" in err
    assert "hint: dataset: mock data is used" in err
    assert "hint: --chain 3: this is the first of 3 jobs" in err
    code, out, _ = command("k8s", "tiny_dense", *SIZES, "--image", "i", "--claim", "disk", *RUN)
    assert code == 0
    assert [part["kind"] for part in yaml.safe_load_all(out)] == ["Service", "Job"]


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [("slurm", (), "submit several with --chain"), ("k8s", ("--image", "i", "--claim", "disk"), "as complete")],
)
def test_a_run_that_ends_early_by_itself_is_hinted_at(command, kind: str, more: tuple[str, ...], message: str):
    assert message not in command(kind, "tiny_dense", *SIZES, *more, *RUN)[2]
    assert message in command(kind, "tiny_dense", *SIZES, *more, *RUN, "train.exit_duration_in_mins=225")[2]


def test_every_option_arrives(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FABRIC", "ib0")
    setup, patch = tmp_path / "setup.sh", tmp_path / "patch.yaml"
    setup.touch()
    patch.write_text("spec: {template: {spec: {priorityClassName: high}}}\n")
    image = ["--container-image", "/i.sif", "--container-mounts", f"/shared,{tmp_path}", "--srun", "mpi=none"]
    both = ["--env", "A=b c", "--env", "FABRIC", "--setup", str(setup), "--logs", "/shared/logs"]
    secret = ["--secret", "TOKEN=/home/me/token"]
    _, out, _ = command(
        "slurm", "tiny_dense", *SIZES, *image, *both, *secret, "--container-runtime", "apptainer", "--after", "7", *RUN
    )
    for text in (
        "export A='b c'\n",
        "export FABRIC=ib0\n",
        "TOKEN=$(cat /home/me/token)",
        "srun --kill-on-bad-exit=0 --mpi=none apptainer exec --nv --bind",
        f". {setup} || exit 2\nexec python -m",
        "--log-dir /shared/logs/",
        "#SBATCH --dependency=afterok:7\n",
    ):
        assert text in out
    more = ["--image", "i", "--claim", "disk", "--secret", "TOKEN=hub/token", "--resource", "cpu=8"]
    more += ["--node-selector", "a=b", "--pull-secret", "registry", "--patch", str(patch)]
    _, out, _ = command("k8s", "tiny_dense", *SIZES, *more, *both, *RUN)
    pod = list(yaml.safe_load_all(out))[-1]["spec"]["template"]["spec"]
    assert (pod["priorityClassName"], pod["nodeSelector"]) == ("high", {"a": "b"})
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 2, "cpu": "8"}
    assert {variable["name"] for variable in pod["containers"][0]["env"]} >= {"A", "FABRIC", "TOKEN"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("slurm", "tiny_dense", *SIZES, *RUN, "model.num_layers=x"), "model.num_layers = 'x'"),
        (("slurm", "tiny_dense", *SIZES, *RUN, "--partition", "x\ntouch F"), "--partition = 'x\\ntouch F'"),
        (("slurm", "tiny_dense", *SIZES, *RUN, "--sbatch", "qos=\ntouch G"), "--sbatch = 'qos=\\ntouch G'"),
        (("slurm", "tiny_dense", *SIZES, *RUN, "--container-mounts", "/a"), "only with --container-image"),
        (("slurm", "tiny_dense", *SIZES, *RUN[:2]), "dataset.mock=true"),
        (("slurm", "tiny_dense", *SIZES, *RUN, "--setup", "/none.sh"), "/none.sh: there is no such file"),
        (("slurm", "tiny_dense", "--nodes", "3", "--gpus-per-node", "1", *RUN), "train.global_batch_size"),
        (("k8s", "tiny_dense", *SIZES, "--image", "i", *RUN), "on the container's own disk"),
        (("k8s", "tiny_dense", *SIZES, *RUN), "Missing option '--image'"),
        (("slurm", *SIZES), "Name a recipe"),
        (("slurm", "tiny_dense", "--cpu", *SIZES, *RUN), "only with --script"),
        (("slurm", "--script", "/none.py", *SIZES), "/none.py: there is no such file"),
        (("slurm", "--script", "/none.py", "--config", "x.yaml", *SIZES), "a script reads its own config"),
        (("local", "tiny_dense", "--partition", "x"), "No such option"),
    ],
)
def test_mistakes(command, arguments: tuple[str, ...], said: str):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize("kind", ["slurm", "k8s"])
def test_mistakes_of_config_paths_and_files_come_together(command, kind: str):
    image = ("--container-image", "i", "--container-mounts", "/shared") if kind == "slurm" else ("--image", "i")
    sizes = ("--nodes", "3", "--gpus-per-node", "1", "--dry-run", "--setup", "none.sh")
    relative = ("checkpoint.save=run", "checkpoint.load=run", "dataset.blend=[web]")
    code, out, err = command(kind, "tiny_dense", *sizes, *image, *relative)
    assert (code, out) == (2, "")
    for said in ("train.global_batch_size", "none.sh: there is no such", "checkpoint.save = 'run'", "= 'web'"):
        assert said in err
    assert ("none.sh: the container does not see it" in err) == (kind == "slurm")


def test_files_that_nodes_may_not_see_are_hinted_at(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_mtp.launch.hints.OF_ONE_MACHINE", (str(tmp_path),))
    setup, secret = tmp_path / "setup.sh", tmp_path / "token"
    setup.touch()
    arguments = ("slurm", "tiny_dense", *SIZES, *RUN, "--setup", str(setup), "--secret", f"TOKEN={secret}")
    _, _, err = command(*arguments)
    assert f"hint: {setup}: lies in a folder that machines seldom share." in err
    assert f"hint: --secret TOKEN: this machine sees no {secret}." in err
    secret.touch()
    assert "--secret" not in command(*arguments)[2]


def test_a_script_is_launched_everywhere(command, tmp_path: Path):
    script = tmp_path / "my_train.py"
    script.touch()
    chosen = ("--script", str(script), "--gpus-per-node", "2", "--dry-run")
    for kind, more, place in (
        ("local", (), script),
        ("slurm", (), script),
        ("k8s", ("--image", "i"), "/etc/megatron-mtp/0-my_train.py"),
    ):
        code, out, _ = command(kind, *chosen, *more, "--", "--rate", "3")
        assert code == 0
        assert f" {place} --rate 3" in out
        assert "megatron_mtp.launch.agent --nproc-per-node 2" in out


def test_without_the_scheduler_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="sbatch: there is no such command on this machine"):
        submit("", ["sbatch"], dry_run=False)


def test_what_the_scheduler_refuses_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command):
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 5\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, out, _ = command("slurm", "tiny_dense", *SIZES[:-1], "--chain", "2", *RUN)
    assert (code, out) == (5, "")


def local(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "megatron_mtp", "launch", "local", "tiny_dense", "--gpus-per-node", "2", *options]
    run = [f"checkpoint.save={folder}/run", f"checkpoint.load={folder}/run", "dist.device=cpu", "dist.num_threads=1"]
    run += ["train.train_iters=2", "validation.eval_iters=0"]
    return subprocess.run([*line, *run], capture_output=True, text=True, timeout=200, check=False)


def test_local_prints_its_command(tmp_path: Path):
    done = local(tmp_path, "--dry-run", "--env", "A=b c")
    agent = f"{sys.executable} -m megatron_mtp.launch.agent --nproc-per-node 2 --max-restarts 3 --standalone "
    begin = f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=285 PYTHONUNBUFFERED=1 A='b c' {agent}"
    assert done.stdout.startswith(f"{begin}-m megatron_mtp pretrain tiny_dense -- checkpoint.save="), done.stderr


@pytest.mark.slow
@pytest.mark.dist
def test_local_trains(tmp_path: Path):
    done = local(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "iter_0000002").is_dir()


@pytest.mark.dist
def test_the_log_of_the_rank_that_failed_is_shown(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, time\n"
        "print('hello of', os.environ['RANK'], flush=True)\n"
        "sys.exit('the cause') if os.environ['RANK'] == '1' else time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "megatron_mtp", "launch", "local", "--gpus-per-node", "2", "--max-restarts", "0"]
    logs = tmp_path / "logs"
    done = subprocess.run(
        [*command, "--script", script, "--logs", logs], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1
    assert "[rank 0] hello of 0" in done.stdout
    assert "hello of 1" not in done.stdout
    assert "rank 1 failed first." in done.stderr
    assert done.stderr.rstrip().endswith("ends with:\nthe cause")
    assert {path.read_text() for path in logs.rglob("stdout.log")} == {"hello of 0\n", "hello of 1\n"}
