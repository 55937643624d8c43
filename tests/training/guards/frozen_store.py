"""Rank 0 of two serves the store and freezes, and rank 1 waits for it; a program for test_watchdog.

Prints the time when rank 1 begins to wait.
"""

from __future__ import annotations

import os
import signal
import time

from torch.distributed import TCPStore

from megatron_mtp.training.guards import watchdog


def serve_and_freeze(ready: int) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(ready, str(store.port).encode())
    store.wait(["rank 1 is watched"])
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_for_rank_0() -> None:
    time.sleep(60)


if __name__ == "__main__":
    reader, writer = os.pipe()
    if os.fork() == 0:  # before any thread is started
        serve_and_freeze(writer)
        os._exit(0)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.read(reader, 16).decode()}
    watchdog.COLLECT_S = watchdog.ASK_S = 0.5
    store = watchdog.job_store()
    with watchdog.Watchdog(1.0, rank=1, world_size=2):
        store.set("rank 1 is watched", "")
        print(time.time(), flush=True)
        wait_for_rank_0()
