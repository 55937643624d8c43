"""One of two ranks of a run in which one stops at step 3, the second if none is named; a program for test_watchdog."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from megatron_mtp import pretrain
from megatron_mtp.training.callbacks import Callback
from tests.training.test_pretrain import tiny


class Hang(Callback):
    """Sleeps for ever, or freezes the process or the first one; slow: takes its time in each step."""

    def __init__(self, how: str):
        self.how = how

    def on_train_start(self, run, state):
        if self.how == "slow" and os.environ["RANK"] == "1":
            named = run.engine.chunks[0].named_parameters()
            weight = next(weight for name, weight in named if name.endswith("layernorm.weight"))
            weight.register_hook(lambda gradient: time.sleep(0.5) or gradient)

    def on_step_end(self, run, state, result):
        if os.environ["RANK"] == str(int(self.how != "first frozen")) and state.iteration == 3:
            if self.how == "asleep":
                time.sleep(600)
            if self.how.endswith("frozen"):
                os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    folder, how = Path(sys.argv[1]), sys.argv[2]
    cfg = tiny(folder, train_iters=25 if how == "slow" else 12)
    cfg.validation.eval_iters, cfg.logger.log_interval = 0, 10
    cfg.dist.watchdog_s, cfg.dist.distributed_timeout_minutes = 6.0, 2.0
    (folder / "started").touch()
    pretrain(cfg, callbacks=[Hang(how)])
