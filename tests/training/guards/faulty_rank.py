"""One of two ranks of a run in which the second one goes wrong twice; a program for test_faults."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_mtp import pretrain
from tests.training.guards.test_faults import Injection
from tests.training.test_pretrain import tiny


class OnRankOne(Injection):
    """The injection, on one rank."""

    @property
    def is_bad(self) -> bool:
        return os.environ["RANK"] == "1" and super().is_bad


if __name__ == "__main__":
    loss, gradient = OnRankOne(2, steps=(3,)), OnRankOne(None, steps=(5,))
    cfg = tiny(Path(sys.argv[1]), train_iters=6)
    cfg.validation.eval_iters, cfg.dataset.prefetch_steps = 0, 0
    pretrain(cfg, loss.forward_step, callbacks=[loss, gradient])
