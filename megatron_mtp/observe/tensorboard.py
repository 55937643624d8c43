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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mtp.observe.jsonl import NO_FIELDS
from megatron_mtp.observe.metrics import evaluation_tag

_file_numbers = itertools.count()


class TensorBoardSink:
    """Writes one event with all scalars of a step; the config and messages go to the page of texts.

    Args:
        folder: the run's event folder; it is created.
        iteration: training steps done before this process. TensorBoard drops events of later steps from earlier ones.
        config: as YAML.
        hparams: name -> value, for the page that compares runs.
    """

    def __init__(
        self, folder: Path, iteration: int, config: str = "", hparams: Mapping[str, float | str] | None = None
    ):
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
        if config:
            self._write_text("config", iteration, f"```yaml\n{config}```")
        if hparams:
            self._write_hparams(hparams, iteration)

    def step(self, iteration: int, metrics: dict[str, float]) -> None:
        """Writes the scalars of one step, as float32."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self._write(step=iteration, summary=self._summary(value=values))

    def evaluation(self, name: str, iteration: int, metrics: dict[str, float]) -> None:
        """Writes one evaluation, each metric under its `evaluation_tag`."""
        self.step(iteration, {evaluation_tag(name, metric): value for metric, value in metrics.items()})

    def message(self, kind: str, iteration: int, text: str, fields: Mapping[str, Any] = NO_FIELDS) -> None:
        """Writes a line under its kind, such as `fault`, or a table, in fixed width."""
        self._write_text(kind, iteration, f"```\n{text}\n```" if "\n" in text else text)

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()

    def _write_text(self, tag: str, iteration: int, markdown: str) -> None:
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text.metadata import create_summary_metadata

        tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()])
        value = self._summary.Value(tag=tag, tensor=tensor, metadata=create_summary_metadata(tag, ""))
        self._write(step=iteration, summary=self._summary(value=[value]))

    def _write_hparams(self, hparams: Mapping[str, float | str], iteration: int) -> None:
        from tensorboard.plugins.hparams.metadata import NULL_TENSOR, SESSION_START_INFO_TAG, create_summary_metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

        start = SessionStartInfo(start_time_secs=time.time())
        for name, value in hparams.items():
            kind = "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"
            setattr(start.hparams[name], f"{kind}_value", value)
        metadata = create_summary_metadata(HParamsPluginData(session_start_info=start))
        value = self._summary.Value(tag=SESSION_START_INFO_TAG, tensor=NULL_TENSOR, metadata=metadata)
        self._write(step=iteration, summary=self._summary(value=[value]))

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()
