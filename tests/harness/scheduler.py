"""A stand-in for Slurm on one machine: `sbatch`, `srun` and `scontrol` on PATH, and what slurmctld does with a job.

`srun` starts one task per node, each in a process group of its own, and returns the highest exit code. A preemption
sends the job's signal to those groups, as `--signal` without `B:` does, and SIGKILL after the grace time. A job that
asks for a requeue starts again with another SLURM_RESTART_COUNT.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

FIRST_JOB = 71
SBATCH = f"""\
folder = pathlib.Path(os.environ["STAND_IN"])
number = {FIRST_JOB} + len(list(folder.glob("job-*")))
(folder / f"job-{{number}}").write_text(sys.stdin.read())
print(number)
"""
SCONTROL = """\
match sys.argv[1:]:
    case ["show", "hostnames", nodes]:
        print(*["localhost"] * len(nodes.split(",")), sep="\\n")
    case ["requeue", job]:
        pathlib.Path(os.environ["STAND_IN"], f"requeue-{job}").touch()
"""
SRUN = """\
import subprocess
command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
tasks = []
for index, node in enumerate(os.environ["SLURM_JOB_NODELIST"].split(",")):
    place = os.environ | {"SLURM_NODEID": str(index), "SLURMD_NODENAME": node}
    tasks.append(subprocess.Popen(command, env=place, start_new_session=True))
    pathlib.Path(os.environ["STAND_IN"], f"task-{tasks[-1].pid}").touch()
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""


@dataclass
class StandIn:
    """Slurm on this machine.

    Args:
        folder: for its programs, jobs and logs.
        nodes: names of the machines of each job.
    """

    folder: Path
    nodes: tuple[str, ...] = ("node0", "node1")
    codes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        for name, body in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN)):
            program = self.folder / name
            program.write_text(f"#!{sys.executable}\nimport os, pathlib, sys\n{body}")
            program.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        """For processes that call its programs."""
        return os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}", "STAND_IN": str(self.folder)}

    @property
    def jobs(self) -> dict[int, str]:
        """Scripts that were submitted, by number."""
        return {int(path.name[4:]): path.read_text() for path in sorted(self.folder.glob("job-*"))}

    def option(self, job: int, name: str) -> str | None:
        """The value of an `#SBATCH` option."""
        found = re.findall(rf"^#SBATCH --{name}=(.*)$", self.jobs[job], re.MULTILINE)
        return found[-1] if found else None

    def log(self, job: int) -> str:
        """What the job printed, over all its starts."""
        return (self.folder / f"log-{job}").read_text()

    def run(self, job: int, preempt_when: Callable[[], bool] | None = None, limit_s: float = 200) -> int:
        """Runs a job until it neither fails nor asks for a requeue, and returns its last exit code.

        Args:
            preempt_when: the first start is preempted as soon as this is true.
        """
        requeue = self.folder / f"requeue-{job}"
        for restarts in range(9):
            code = self._start(job, restarts, preempt_when if restarts == 0 else None, limit_s)
            self.codes.append(code)
            if not requeue.exists():
                return code
            requeue.unlink()
        raise AssertionError("requeued without end")

    def _start(self, job: int, restarts: int, preempt_when: Callable[[], bool] | None, limit_s: float) -> int:
        place: Mapping[str, str] = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": ",".join(self.nodes)}
        counts = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        for task in self.folder.glob("task-*"):
            task.unlink()
        with (self.folder / f"log-{job}").open("a") as log:
            script = subprocess.Popen(
                ["bash", self.folder / f"job-{job}"],
                env={**self.environment, **place, **counts},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
            kill_at = time.monotonic() + limit_s
            while script.poll() is None:
                if preempt_when is not None and preempt_when():
                    name, _, grace_s = str(self.option(job, "signal")).partition("@")
                    self._signal(signal.Signals[f"SIG{name}"])
                    kill_at, preempt_when = time.monotonic() + float(grace_s), None
                if time.monotonic() > kill_at:
                    self._signal(signal.SIGKILL)
                    script.kill()
                time.sleep(0.02)
        return script.returncode

    def _signal(self, number: signal.Signals) -> None:
        for task in self.folder.glob("task-*"):
            with suppress(ProcessLookupError):
                os.killpg(int(task.name[5:]), number)
