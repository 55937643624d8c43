"""Local ranks: all end when one fails, and the first cause is reported once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from megatron_mtp.launch import local as launch_module
from megatron_mtp.launch.local import run_ranks

pytestmark = pytest.mark.unit

PRELUDE = """
import os, signal, sys, time
from megatron_mtp.launch.failure import exit_code_of
from megatron_mtp.errors import DataError
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def fail(error):
    try:
        raise error
    except Exception as caught:
        sys.exit(exit_code_of(caught))
"""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(launch_module, "SETTLE_S", 1.0)
    monkeypatch.setattr(launch_module, "TERM_S", 1.0)


def run(body: str, num_ranks: int = 2) -> int:
    return run_ranks([sys.executable, "-c", PRELUDE + textwrap.dedent(body)], num_ranks)


def test_ranks_find_their_place(capfd):
    code = run("""
        names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
        assert os.environ["MASTER_PORT"].isdigit()
        sys.stdout.write(" ".join(os.environ[name] for name in names) + "\\n")
    """, 3)  # fmt: skip
    assert code == 0
    assert capfd.readouterr().out.splitlines() == ["0 0 3 3 127.0.0.1"], "only rank 0 has the terminal"


def test_a_mistake_that_all_ranks_meet_is_reported_once(capfd):
    assert run("fail(DataError('no such file'))", 3) == 2
    assert capfd.readouterr().err == "megatron-mtp: no such file\n"


def test_a_mistake_of_one_rank_ends_the_others_and_is_the_cause(capfd):
    code = run("""
        if rank == 1:
            fail(DataError("token id 9 in batch 3"))
        time.sleep(0.3)
        fail(RuntimeError("[gloo] Connection closed by peer"))
    """)
    assert code == 2
    assert capfd.readouterr().err == "megatron-mtp: token id 9 in batch 3\n"


def test_the_first_crash_is_reported_even_if_its_echo_is_written_first(capfd):
    code = run("""
        if rank == 0:
            fail(RuntimeError("[gloo] Connection closed by peer"))
        time.sleep(0.3)
        fail(ZeroDivisionError("the cause"))
    """)
    err = capfd.readouterr().err
    assert code == 1
    assert "rank 1 failed first: exit code 1" in err
    assert "ZeroDivisionError: the cause" in err
    assert "gloo" not in err


def test_a_killed_rank_takes_a_hanging_one_down(capfd):
    begin = time.monotonic()
    code = run("""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == 1:
            print("last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    """)
    err = capfd.readouterr().err
    assert code == 128 + signal.SIGKILL
    assert "rank 1 failed first: ended by SIGKILL" in err
    assert "last words" in err
    assert time.monotonic() - begin < 40


@pytest.mark.parametrize(
    ("number", "code", "ended"), [(signal.SIGTERM, 0, ["ended0", "ended1"]), (signal.SIGINT, 130, ["ended0", "ended1"])]
)
def test_signals_end_every_rank(tmp_path, number, code, ended):
    body = f"""
        def end(*_):
            open(f"{tmp_path}/ended{{rank}}", "w").close()
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        open(f"{tmp_path}/ready{{rank}}", "w").close()
        time.sleep(600)
    """
    command = f"[sys.executable, '-c', {PRELUDE + textwrap.dedent(body)!r}]"
    script = f"import sys; from megatron_mtp.launch.local import run_ranks; sys.exit(run_ranks({command}, 2))"
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(number)
    assert parent.wait(60) == code
    assert sorted(path.name for path in tmp_path.glob("ended*")) == ended


@pytest.mark.dist
def test_torchrun_prints_a_mistake_once():
    done = torchrun("-m", "megatron_mtp", "pretrain", "tiny_dense", "model.num_layers=abc")
    assert done.returncode != 0
    assert done.stderr.count("model.num_layers = 'abc': must be an integer.") == 1


@pytest.mark.dist
def test_torchrun_lets_rank_0_report_the_cause_of_another_rank(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + textwrap.dedent("""
        import torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()  # a rank that leaves while others still connect is another mistake
        if rank == 1:
            try:
                raise DataError("token id 9")
            except DataError as error:
                dist.destroy_process_group()
                sys.exit(exit_code_of(error))
        try:
            dist.barrier()
        except Exception as error:
            sys.exit(exit_code_of(error))
    """))  # fmt: skip
    done = torchrun(str(script))
    assert done.stderr.count("[rank 1] megatron-mtp: token id 9") == 1
    assert done.returncode != 0


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
