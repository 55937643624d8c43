"""TensorBoard events, written record by record.

`torch.utils.tensorboard` and `tensorboard.summary.Writer` open files through `tensorboard.compat.tf`, which imports TensorFlow where it
is installed: tens of seconds, and it takes GPU memory. An event file is a plain sequence of checksummed records, so the sink frames them
itself with tensorboard's own `RecordWriter` and message types, which import neither TensorFlow nor torch.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

_file_numbers = itertools.count()


class TensorBoardSink:
    """Writes one event with all scalars of a step.

    Args:
        folder: the run's event folder; it is made.
        iteration: training steps done before this process. TensorBoard drops events of later steps that an earlier process left.
    """

    def __init__(self, folder: Path, iteration: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names, so time comes first.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_file_numbers):04d}"
        self._writer = RecordWriter((folder / name).open("wb"))
        self._write(file_version="brain.Event:2")
        self._write(session_log=SessionLog(status=SessionLog.START), step=iteration + 1)

    def step(self, iteration: int, figures: dict[str, float]) -> None:
        """Writes the scalars of one step."""
        self._scalars(iteration, figures)

    def evaluation(self, name: str, iteration: int, figures: dict[str, float]) -> None:
        """Writes one evaluation as `lm loss validation`, as Megatron names it."""
        self._scalars(iteration, {f"{key} {name}": value for key, value in figures.items()})

    def message(self, kind: str, iteration: int, text: str) -> None:
        """Text is not kept here."""

    def close(self) -> None:
        """Writes what is buffered and closes the file."""
        self._writer.close()

    def _scalars(self, iteration: int, figures: dict[str, float]) -> None:
        # Event files hold scalars as float32.
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self._write(step=iteration, summary=self._summary(value=values))

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()
