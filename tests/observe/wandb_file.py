"""Reads the file of an offline W&B run back, from the file format up: the wandb package no longer ships a reader."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = 7  # of the file, and of each record in it: checksum, length, type
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_history(folder: Path, run_id: str) -> list[dict[str, Any]]:
    """The rows logged to a run, in order, over all of its offline files in the order of their making.

    Values come back as JSON numbers, or as the strings "NaN" and "Infinity".
    """
    rows = []
    paths = folder.glob(f"wandb/offline-run-*-{run_id}*/run-{run_id}.wandb")
    for path in sorted(paths, key=lambda path: path.parent.name):
        for record in _finished(path):
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def read_records(folder: Path, run_id: str, kind: str) -> list[Any]:
    """The records of one kind, such as `run` or `alert`, over all offline files of a run."""
    paths = folder.glob(f"wandb/offline-run-*-{run_id}*/run-{run_id}.wandb")
    records = [record for path in sorted(paths) for record in _finished(path)]
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def _finished(path: Path, wait_s: float = 30.0) -> list[Any]:
    """All records of a run. W&B's own process may still be writing them when `finish` returns."""
    deadline = time.monotonic() + wait_s
    while True:
        records = list(_records(path.read_bytes()))
        kinds = [record.WhichOneof("record_type") for record in records]
        if "exit" in kinds:
            return records
        assert time.monotonic() < deadline, f"{path} was not finished in {wait_s} s; it holds {kinds}"
        time.sleep(0.05)


def _records(data: bytes):
    from wandb.proto.wandb_internal_pb2 import Record

    assert data[:4] == b":W&B"
    position, parts = HEADER, []
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if position > len(data):
            return  # still being written
        if kind in (WHOLE, LAST):
            yield Record.FromString(b"".join(parts))
            parts = []
        assert kind in (WHOLE, FIRST, MIDDLE, LAST)
