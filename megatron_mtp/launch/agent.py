"""torchrun with what long jobs need: `python -m megatron_mtp.launch.agent <arguments of torchrun>`.

- It returns the exit code of the ranks: dist.preempted_exit_code after SIGTERM and a checkpoint, 2 for a mistake, 4 for
  bad numbers, 6 for a last checkpoint that could not be saved. torchrun itself always returns 1.
- It forwards SIGUSR1 to the ranks, which save and continue. torchrun would die of it.
- Each start of the ranks has its own store (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1). torchrun's shared store separates
  starts by each agent's number of restarts; agents that were cut off count differently, and ranks find dead addresses.
- After a network failure, which ends the agent's rendezvous, it joins again until REJOIN_S have passed without success.
  torchrun gives up at once.

Ranks that do not end within TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (torchrun's variable, default 30) of a SIGTERM are
killed.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_mtp.launch.local import tail

EXIT_DIR = "MEGATRON_MTP_EXIT_DIR"
"""Set for the ranks: the folder in which a rank that leaves in order writes its exit code, under its process id."""
REJOIN_S = 900.0
PAUSE_S = 3.0
SOUND_S = 60.0
"""An agent that ran this long had joined: REJOIN_S starts again."""


def note_exit(code: int) -> None:
    """Reports the exit code of this rank to the agent, if there is one."""
    if folder := os.environ.get(EXIT_DIR):
        Path(folder, f"{os.getpid()}").write_text(str(code))


def main(arguments: list[str] | None = None) -> int:
    """Runs torchrun and returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="megatron-mtp-agent-") as folder:
        os.environ[EXIT_DIR] = folder
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        signal.signal(signal.SIGUSR1, lambda *_: _signal_ranks(signal.SIGUSR1))
        signal.signal(signal.SIGTERM, _leave)
        return _keep_joining(lambda: _run(arguments, Path(folder)))


def _run(arguments: list[str] | None, folder: Path) -> int:
    """Runs torchrun's agent once.

    Raises:
        RendezvousError, DistNetworkError and others: the agent lost the job's store.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    signal.signal(signal.SIGTERM, _leave)  # until torchrun's own handler takes over with the first ranks
    options = parse_args(arguments)
    try:
        run(options)
    except SignalException as error:
        codes = {int(path.read_text()) for path in folder.iterdir()}
        return codes.pop() if len(codes) == 1 else 128 + error.sigval
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        rank, failure = error.get_first_failure()
        if options.log_dir and failure.local_rank > 0:  # the first rank of a node also wrote here
            _show_log(rank, failure.local_rank, Path(options.log_dir))
        code = failure.exitcode
        return 128 - code if code < 0 else code
    return 0


def _show_log(rank: int, local_rank: int, folder: Path) -> None:
    """Prints the last lines of a rank that wrote only into files."""
    logs = sorted(folder.glob(f"*/attempt_*/{local_rank}/stderr.log"), key=os.path.getmtime)
    if logs:
        print(f"megatron-mtp agent: rank {rank} failed first. {logs[-1]} ends with:", file=sys.stderr)
        print(tail(logs[-1]), file=sys.stderr, flush=True)


def _leave(number: int, _: object) -> None:
    """SIGTERM before there are ranks. The first process of a container has no default action and would keep waiting."""
    sys.exit(128 + number)


def _keep_joining(run: Callable[[], int]) -> int:
    from torch.distributed import DistError
    from torch.distributed.elastic.rendezvous import RendezvousError

    lost_s = time.monotonic()
    while True:
        begin_s = time.monotonic()
        try:
            return run()
        except (RendezvousError, DistError, ConnectionError, TimeoutError) as error:
            now_s = time.monotonic()
            if now_s - begin_s > SOUND_S:
                lost_s = now_s
            if now_s - lost_s > REJOIN_S:
                raise
            cause = str(error).partition("\n")[0]
            print(f"megatron-mtp agent: {type(error).__name__}: {cause}. Joining again.", file=sys.stderr, flush=True)
            time.sleep(PAUSE_S)


def _signal_ranks(number: int) -> None:
    """Sends a signal to the ranks: children of this process, which lead no process groups."""
    import psutil

    for child in psutil.Process().children():
        if "RANK" in child.environ():
            child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
