"""torchrun, with what a job of weeks needs beside it: `python -m megatron_mtp.launch.agent <arguments of torchrun>`.

- Its exit code is that of the ranks: dist.preempted_exit_code after SIGTERM and a checkpoint, 2 for a mistake, 4 for bad numbers. torchrun
  itself ends with 1 whatever happened.
- SIGUSR1 is passed on to the ranks, which save and go on. torchrun would die of it.
- Each start of the ranks has a store of its own (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1). In torchrun's shared one keys are told apart by
  how often an agent has restarted its ranks; after one host was cut off the agents count differently, and ranks meet dead addresses.
- Where the network fails, the rendezvous of an agent fails with it; the agent then joins again, until REJOIN_S have passed without success.
  torchrun gives up at once.

Ranks that do not end within TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds of a SIGTERM (torchrun's variable, default 30) are killed.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

EXIT_DIR = "MEGATRON_MTP_EXIT_DIR"
"""Set for the ranks: the folder where one that leaves in order writes its process id and exit code."""
REJOIN_S = 900.0
PAUSE_S = 3.0
SOUND_S = 60.0
"""An agent that has run this long had joined: the time for joining again counts anew."""


def note_exit(code: int) -> None:
    """Tells the agent, if there is one, with which code this rank is leaving."""
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
    """One life of torchrun's agent.

    Raises:
        RendezvousError, DistNetworkError and others: the agent lost the job's store.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    signal.signal(signal.SIGTERM, _leave)  # until torchrun's own handler takes over with the first ranks
    try:
        run(parse_args(arguments))
    except SignalException as error:
        codes = {int(path.read_text()) for path in folder.iterdir()}
        return codes.pop() if len(codes) == 1 else 128 + error.sigval
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        code = error.get_first_failure()[1].exitcode
        return 128 - code if code < 0 else code
    return 0


def _leave(number: int, _: object) -> None:
    """While there are no ranks. The first process of a container has no default for SIGTERM: it would go on waiting."""
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
    """The ranks are the children of this process; they lead no groups of their own."""
    import psutil

    for child in psutil.Process().children():
        if "RANK" in child.environ():
            child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
