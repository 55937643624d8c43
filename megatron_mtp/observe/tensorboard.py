"""TensorBoard events, written record by record.

`torch.utils.tensorboard` and `tensorboard.summary.Writer` open files through `tensorboard.compat.tf`, which imports
TensorFlow if it is installed; that takes tens of seconds and GPU memory. An event file is a plain sequence of
checksummed records, so the sink writes them itself with tensorboard's `RecordWriter` and message types, which import
neither TensorFlow nor torch.
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
        folder: the run's event folder; it is created.
        iteration: training steps done before this process. TensorBoard drops events of later steps from earlier ones.
    """

    def __init__(self, folder: Path, iteration: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names, so time comes first.
        process = f"{socket.gethostname()}.{os.getpid()}.{next(_file_numbers):04d}"
        self._writer = RecordWriter((folder / f"events.out.tfevents.{int(time.time()):010d}.{process}").open("wb"))
        self._write(file_version="brain.Event:2")
        self._write(session_log=SessionLog(status=SessionLog.START), step=iteration + 1)

    def step(self, iteration: int, metrics: dict[str, float]) -> None:
        """Writes the scalars of one step, as float32."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self._write(step=iteration, summary=self._summary(value=values))

    def evaluation(self, name: str, iteration: int, metrics: dict[str, float]) -> None:
        """Writes one evaluation as `lm loss validation`, as Megatron names it."""
        self.step(iteration, {f"{key} {name}": value for key, value in metrics.items()})

    def message(self, kind: str, iteration: int, text: str) -> None:
        """TensorBoard gets no text."""

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()
