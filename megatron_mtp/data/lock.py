"""A lock that names its owner, for a directory that several machines may share.

The lock is a small file. It does not rely on `flock` alone, which some mounts lack (Lustre without `-o flock`, many
FUSE file systems), which others keep to one machine, and which does not say who holds it.

- **Taking.** The file is created with O_EXCL, which is atomic on local file systems and on NFS since version 3.
- **Heartbeat.** A thread of the owner renews the modification time every BEAT_S.
- **Is the owner alive?** On its own machine (same boot, same PID namespace) the process table answers at once: the
  process is gone, or another one with another start time has its number. From elsewhere only the heartbeat tells: an
  owner without one for SILENT_S is gone. The waiting process measures this with its own clock from its first look on,
  so that no clocks of two machines are compared, and does not count the time in which the file system gave no answer.
- **Taking over.** The lock of an owner that is gone is replaced by a rename, so that it is never absent. `flock` on the
  old file, where there is one, keeps two waiting processes from doing so at once. Elsewhere both may, and the one whose
  file is there SETTLE_S later has the lock.
- **Losing it.** A process that was frozen for longer than SILENT_S may find that another one has taken over.
  `check` raises then; an owner calls it before it changes anything in the directory.
- **On object storage** the lock is an object, made by a request that fails where one is. Only its owner writes the
  object of its heartbeat beside it, so that a frozen owner that wakes up cannot overwrite the lock of the next one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from megatron_mtp.errors import InUseError
from megatron_mtp.storage.place import Place, write_durably
from megatron_mtp.storage.remote_path import RemotePath

logger = logging.getLogger(__name__)

BEAT_S = 10.0
SILENT_S = 120.0
"""A thread of a busy process, or a metadata server that fails over, may be late by a minute; nobody is by two."""
POLL_S = 0.5
SETTLE_S = 3.0
REPORT_S = 15.0


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        token: identifies this use of the lock.
        machine: boot and PID namespace: processes with the same value see each other. Pods of one name, or a machine
            before and after a reboot, have different ones.
        pid: within that namespace.
        started: start time of the process, in the machine's own form.
        job: as the scheduler calls it; empty without one.
        launched: UTC.
        is_leaving: it does no more than what must be done before its end.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str
    job: str
    launched: str
    is_leaving: bool = False

    @classmethod
    def this_process(cls) -> Owner:
        """A new use of a lock by this process."""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_start_time(os.getpid()) or "",
            job=_job(),
            launched=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        if self == UNKNOWN:
            return "a process that left no name"
        job = f"{self.job}, " if self.job else ""
        return f"process {self.pid} on {self.host} ({job}launched {self.launched})"

    @property
    def is_here(self) -> bool:
        """Whether this process can see the owner's in the process table."""
        return self.machine == _machine()

    @property
    def is_gone(self) -> bool:
        """Whether the owner has ended, as far as the process table tells.

        A process trains one run at a time, so what it held before is free.
        """
        return self.is_here and (self.pid == os.getpid() or _start_time(self.pid) != self.started)


UNKNOWN = Owner("", "", "", 0, "", "", "")
"""Owner of a lock that is just being written, or whose writer died in the middle of it."""


class _Storage(Protocol):
    """Where a lock is kept."""

    def exists(self) -> bool: ...

    def create(self, owner: Owner) -> bool:
        """Makes the lock, unless there is one."""

    def read(self) -> tuple[Owner, int]:
        """The owner, and the time of its last heartbeat in ns.

        Raises:
            FileNotFoundError: there is none.
        """

    def beat(self, owner: Owner) -> None:
        """Renews the heartbeat of the owner."""

    def replace(self, owner: Owner) -> None:
        """Puts a lock in place of the one that is there."""

    def take_over(self, gone: Owner, owner: Owner) -> bool:
        """Replaces the lock of an owner that is gone, unless another process was faster."""

    def remove(self, owner: Owner) -> None:
        """Removes the lock of this owner."""


class Lock:
    """A lock file, or a lock behind an address.

    Args:
        path: the file; its folder must exist.
        what: what it protects, as messages name it: `checkpoint.save = /shared/run`.
    """

    def __init__(self, path: Place, what: str):
        self._storage: _Storage = _Object(path) if isinstance(path, RemotePath) else _File(path)
        self.path, self.what, self.owner = path, what, Owner.this_process()
        self.silent_s = 0.0
        """Seconds for which this process has watched the present owner without a heartbeat."""
        self.has_beaten = False
        """Whether this process has seen a heartbeat of the present owner."""
        self._stamp: tuple[str, int] | None = None
        self._looked_s = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"{path.name}-heartbeat", daemon=True)

    def take(self, patience_s: float, leaving_patience_s: float = 0.0) -> Iterator[Owner]:
        """Waits for the lock. Yields the owner after each look, every POLL_S, and ends when this process has it.

        Args:
            patience_s: how long to wait for an owner that is alive and stays.
            leaving_patience_s: how long to wait for one that is about to end.

        Raises:
            InUseError: the owner has not ended in time. Whether it is alive may take SILENT_S to find out.
            OSError: the lock cannot be read or written.
        """
        began_s, said_s = time.monotonic(), 0.0
        while (owner := self._try()) is not None:
            now_s = time.monotonic()
            limit_s = leaving_patience_s if owner.is_leaving else patience_s
            is_alive = owner.is_here or (self.has_beaten and self.silent_s < 3 * BEAT_S)
            if now_s - began_s >= limit_s and is_alive:
                raise InUseError(
                    f"{self.what}: is in use by {owner}. Wait until that process has ended, stop it, or choose "
                    "another directory."
                )
            if not said_s or now_s - said_s >= REPORT_S:
                said_s = now_s
                state = (
                    f"{self.silent_s:.0f} s without a heartbeat, gone after {SILENT_S:.0f} s"
                    if not is_alive
                    else "about to end"
                    if owner.is_leaving
                    else "alive"
                )
                text = "%s: is in use by %s: %s. Waiting, %.0f of at most %.0f s."
                logger.warning(text, self.what, owner, state, now_s - began_s, limit_s if is_alive else SILENT_S)
            time.sleep(POLL_S)
            yield owner

    def check(self) -> None:
        """Returns if this process still has the lock. A lock file that somebody deleted is made again.

        Raises:
            InUseError: another process has it.
            OSError: the file cannot be read or made.
        """
        if not self._storage.exists() and self._storage.create(self.owner):
            return
        if (owner := self._storage.read()[0]).token != self.owner.token:
            raise InUseError(
                f"{self.what}: is in use by {owner}, which took over from this process ({self.owner}) because it gave "
                f"no heartbeat for {SILENT_S:.0f} s or its lock {self.path} was removed. This process changes nothing "
                "there any more."
            )

    def announce_end(self) -> None:
        """Tells waiting processes that this one is about to end. Errors are ignored."""
        with suppress(OSError, InUseError):
            self.check()
            self.owner = replace(self.owner, is_leaving=True)
            self._storage.replace(self.owner)

    def release(self) -> None:
        """Gives the lock back, if this process has it. May be called twice. Errors are ignored."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        with suppress(OSError):
            if self._storage.read()[0].token == self.owner.token:
                self._storage.remove(self.owner)

    def _try(self) -> Owner | None:
        """One attempt. Returns who has the lock; None: this process."""
        if self._storage.create(self.owner):
            self._thread.start()
            return None
        try:
            return self._examine()
        except FileNotFoundError:  # released since
            return self._try()

    def _examine(self) -> Owner | None:
        """Looks at the lock of another owner, and takes it over if that one is gone."""
        owner, changed = self._storage.read()
        now_s = time.monotonic()
        if (owner.token, changed) != self._stamp:
            self.has_beaten = self._stamp is not None and self._stamp[0] == owner.token
            self._stamp, self.silent_s = (owner.token, changed), 0.0
        else:
            self.silent_s += min(now_s - self._looked_s, 2 * POLL_S)
        self._looked_s = now_s
        if (owner.is_gone or (not owner.is_here and self.silent_s >= SILENT_S)) and self._storage.take_over(
            owner, self.owner
        ):
            logger.warning("%s: taken over from %s, which is gone", self.what, owner)
            self._thread.start()
            return None
        return owner

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            with suppress(OSError):  # the next beat, or the next save, may have more luck
                if self._storage.read()[0].token != self.owner.token:
                    return
                self._storage.beat(self.owner)


@dataclass(frozen=True, slots=True)
class _File:
    """On a file system."""

    path: Path

    def exists(self) -> bool:
        return self.path.exists()

    def create(self, owner: Owner) -> bool:
        try:
            write_durably(self.path, _as_bytes(owner))
        except FileExistsError:
            return False
        return True

    def read(self) -> tuple[Owner, int]:
        with self.path.open("rb") as file:  # NFS asks its server again for a file that is opened
            text, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
        return _as_owner(text), changed

    def beat(self, owner: Owner) -> None:
        os.utime(self.path)

    def replace(self, owner: Owner) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{owner.token}")
        try:
            write_durably(temporary, _as_bytes(owner))
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def take_over(self, gone: Owner, owner: Owner) -> bool:
        with self.path.open("rb") as old:
            has_flock = True
            try:
                fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                has_flock = False
            if self.read()[0].token != gone.token or not os.path.samestat(os.fstat(old.fileno()), self.path.stat()):
                return False
            self.replace(owner)
        if not has_flock:
            time.sleep(SETTLE_S)
        return self.read()[0].token == owner.token

    def remove(self, owner: Owner) -> None:
        self.path.unlink()


@dataclass(frozen=True, slots=True)
class _Object:
    """On object storage."""

    path: RemotePath

    def exists(self) -> bool:
        return self.path.exists()

    def create(self, owner: Owner) -> bool:
        try:
            self.path.create(_as_bytes(owner))
        except FileExistsError:
            # A request whose answer was lost is repeated, and finds what it made.
            if self.read()[0].token != owner.token:
                return False
        self.beat(owner)
        return True

    def read(self) -> tuple[Owner, int]:
        owner = _as_owner(self.path.read_bytes())
        try:
            beaten = self._beat_path(owner).stat()
        except FileNotFoundError:
            beaten = self.path.stat()
        return owner, beaten.st_mtime_ns

    def beat(self, owner: Owner) -> None:
        self._beat_path(owner).write_bytes(b"")

    def replace(self, owner: Owner) -> None:
        self.path.write_bytes(_as_bytes(owner))

    def take_over(self, gone: Owner, owner: Owner) -> bool:
        self.replace(owner)
        self.beat(owner)
        time.sleep(SETTLE_S)
        if self.read()[0].token != owner.token:
            self._beat_path(owner).unlink()
            return False
        with suppress(OSError):
            self._beat_path(gone).unlink(missing_ok=True)
        return True

    def remove(self, owner: Owner) -> None:
        self.path.unlink()
        self._beat_path(owner).unlink(missing_ok=True)

    def _beat_path(self, owner: Owner) -> RemotePath:
        return self.path.with_name(f"{self.path.name}.{owner.token or 'unknown'}.beat")


def _as_bytes(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner), indent=1) + "\n").encode()


def _as_owner(text: bytes) -> Owner:
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return UNKNOWN


def _machine() -> str:
    """Boot and PID namespace of this process; the host's name where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_time(pid: int) -> str | None:
    """When a process was started, in clock ticks since the machine's boot; None: it has ended.

    A zombie, which its parent has not asked for yet, has ended.
    """
    if sys.platform != "linux":
        import psutil

        try:
            return str(psutil.Process(pid).create_time())
        except psutil.Error:
            return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _job() -> str:
    """The job of this process, as the scheduler calls it."""
    names = {"SLURM_JOB_ID": "Slurm job", "TORCHELASTIC_RUN_ID": "torchrun job"}
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return f"Kubernetes pod {socket.gethostname()}"
    found = (f"{name} {os.environ[key]}" for key, name in names.items() if os.environ.get(key, "none") != "none")
    return next(found, "")
