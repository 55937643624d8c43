"""Two hosts of one job on this machine: two network namespaces with their own addresses and a switch that can cut each.

Where namespaces cannot be made, both agents run on loopback and nothing can be cut.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mtp.observe.jsonl import read_metrics

PORT = 29533
TIMEOUT_S = 20


def missing() -> str | None:
    """Why namespaces cannot be made here; None: they can."""
    if shutil.which("ip") is None:
        return "the command `ip` (Debian: iproute2) is not installed"
    probe = f"mtp-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@dataclass
class Hosts:
    """Names and addresses of two hosts, and the agents that run there."""

    folder: Path
    is_apart: bool
    prefix: str = field(default_factory=lambda: f"mtp{os.getpid()}")
    agents: list[subprocess.Popen] = field(default_factory=list)

    def name(self, host: int | str) -> str:
        return f"{self.prefix}-{host}"

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}" if self.is_apart else "127.0.0.1"

    def make(self) -> None:
        """A namespace for each host and one for the switch."""
        for name in (0, 1, "switch"):
            run("ip", "netns", "add", self.name(name))
            run("ip", "-n", self.name(name), "link", "set", "lo", "up")
        switch = self.name("switch")
        run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "br0", "up")
        for host in (0, 1):
            here = self.name(host)
            run(*f"ip link add veth0 netns {here} type veth peer name port{host} netns {switch}".split())
            run(*f"ip -n {here} addr add {self.address(host)}/24 dev veth0".split())
            run(*f"ip -n {here} link set veth0 up".split())
            run(*f"ip -n {switch} link set port{host} up".split())
            self.join(host)

    def cut(self, host: int) -> None:
        """No packet reaches or leaves the host any more; its link stays up, as with a failing switch."""
        run(*f"ip -n {self.name('switch')} link set port{host} nomaster".split())

    def join(self, host: int) -> None:
        run(*f"ip -n {self.name('switch')} link set port{host} master br0".split())

    def start(self, *options: str) -> None:
        """One agent with one rank on each host; the first one holds the rendezvous."""
        for host in (0, 1):
            inside = ["ip", "netns", "exec", self.name(host)] if self.is_apart else []
            agent = [sys.executable, "-m", "megatron_mtp.launch.agent", "--nnodes", "2", "--nproc-per-node", "1"]
            agent += ["--max-restarts", "20", "--rdzv-backend", "c10d", "--rdzv-id", "job"]
            agent += ["--rdzv-endpoint", f"{self.address(0)}:{PORT}", "--local-addr", self.address(host)]
            # A namespace has this machine's host name, so the agents cannot tell by it which of them holds the store.
            agent += ["--rdzv-conf", f"is_host={int(host == 0)},timeout=15,read_timeout=15,join_timeout=600"]
            agent += ["-m", "megatron_mtp", "pretrain", "tiny_dense", *options]
            environment = os.environ | {"GLOO_SOCKET_IFNAME": "veth0" if self.is_apart else "lo"}
            log = (self.folder / f"host{host}.log").open("wb")
            self.agents.append(
                subprocess.Popen([*inside, *agent], env=environment, stdout=log, stderr=subprocess.STDOUT)
            )

    def logs(self) -> str:
        return "\n".join((self.folder / f"host{host}.log").read_text()[-3000:] for host in (0, 1))

    def remove(self) -> None:
        for agent in self.agents:
            agent.terminate()
        for agent in self.agents:
            try:
                agent.wait(40)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()
        if self.is_apart:
            for name in (0, 1, "switch"):
                subprocess.run(["ip", "netns", "del", self.name(name)], check=False)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    hosts = Hosts(folder, is_apart=missing() is None)
    try:
        if hosts.is_apart:
            hosts.make()
        yield hosts
    finally:
        hosts.remove()


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def steps_done(folder: Path) -> int:
    """Steps of the curve so far."""
    path = folder / "metrics.jsonl"
    return max((line["iteration"] for line in read_metrics(path)), default=0) if path.exists() else 0


def wait_for_step(folder: Path, step: int, limit_s: float) -> float:
    """Waits until the curve has this step. Returns the seconds it took."""
    begin = time.monotonic()
    while steps_done(folder) < step:
        if time.monotonic() - begin > limit_s:
            raise TimeoutError(f"step {step} was not reached in {limit_s} s; it stands at {steps_done(folder)}")
        time.sleep(0.2)
    return time.monotonic() - begin
