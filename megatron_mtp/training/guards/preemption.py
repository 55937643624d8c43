"""Turns signals, clocks and requests to stop into one decision of all ranks after each step.

SIGTERM: save and leave with dist.preempted_exit_code. SIGUSR1: save and continue. A signal may reach one rank only, and
clocks differ, so one small all-reduce gives every rank what any rank has noticed: no rank saves alone. An evaluation
asks for signals with each of its batches.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_mtp.config import ConfigContainer

logger = logging.getLogger(__name__)


class SignalWatch:
    """Notes SIGTERM and SIGUSR1 while it is entered, in the main thread only: Python catches no signals in others.

    Args:
        on_leave: called by the signal handler when SIGTERM comes, whatever the main thread does at that moment.
        steps_done: steps before this process; StepBoundary keeps it up to date.
    """

    def __init__(self, on_leave: Callable[[], None] = lambda: None, steps_done: int = 0):
        self.wants_leave = self.wants_save = False
        self.steps_done = steps_done
        self.came_after: int | None = None
        """The step after which SIGTERM came to this rank."""
        self._on_leave = on_leave
        self._handlers: dict[int, Any] = {}

    @property
    def noticed(self) -> tuple[bool, bool]:
        """Whether this rank was asked to leave, and to save."""
        return self.wants_leave, self.wants_save

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGTERM:
            if not self.wants_leave:
                self.came_after = self.steps_done
            self.wants_leave = True
            self._on_leave()
        else:
            self.wants_save = True


@dataclass(frozen=True, slots=True)
class Decision:
    """What all ranks do after a step, the same on each rank: a reason to save or leave, or None."""

    save: str | None = None
    leave: str | None = None
    is_preempted: bool = False


class StepBoundary:
    """Decides after each step whether to save or leave.

    Args:
        device: where collectives keep their tensors.
    """

    def __init__(self, cfg: ConfigContainer, signals: SignalWatch, device: torch.device):
        self._train, self._checkpoint, self.signals, self._device = cfg.train, cfg.checkpoint, signals, device
        self._started_s = self._saved_s = time.monotonic()

    def follow(self, cfg: ConfigContainer) -> None:
        """Decides by the config of another phase from now on; the clocks go on."""
        self._train, self._checkpoint = cfg.train, cfg.checkpoint

    def saved(self) -> None:
        """A checkpoint was written: save_interval_mins counts from now on."""
        self._saved_s = time.monotonic()

    def decide(self, iteration: int, stop_reason: str | None = None) -> Decision:
        """A collective. A decision to leave is a decision to save as well.

        Args:
            iteration: steps done.
            stop_reason: why this rank asks to end the run; None: it does not ask.
        """
        now_s, signals = time.monotonic(), self.signals
        signals.steps_done = iteration
        noticed = [
            *signals.noticed,
            _is_over(now_s - self._started_s, self._train.exit_duration_in_mins),
            _is_over(now_s - self._saved_s, self._checkpoint.save_interval_mins),
            stop_reason is not None,
        ]
        flags = torch.tensor([int(flag) for flag in noticed], dtype=torch.int, device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        is_preempted, save_asked, is_late, is_due, is_stopped = (bool(flag) for flag in flags.tolist())
        if save_asked:
            signals.wants_save = False
        if is_preempted:
            return Decision(save="SIGTERM", leave="SIGTERM", is_preempted=True)
        if is_stopped:
            return Decision(save="stop requested", leave=stop_reason or "another rank asked to stop")
        if is_late:
            return Decision(save="exit_duration_in_mins", leave="train.exit_duration_in_mins is over")
        if _divides(self._train.exit_interval, iteration):
            return Decision(save="exit_interval", leave="train.exit_interval")
        if save_asked:
            return Decision(save="SIGUSR1")
        if _divides(self._checkpoint.save_interval, iteration):
            return Decision(save="interval")
        return Decision(save="save_interval_mins" if is_due else None)


def _is_over(elapsed_s: float, limit_mins: float | None) -> bool:
    return limit_mins is not None and elapsed_s > 60 * limit_mins


def _divides(interval: int | None, iteration: int) -> bool:
    return interval is not None and iteration % interval == 0
