"""Writes one rank's shards to one file in torch's distributed checkpoint format, planned by Megatron-Core.

Megatron-Core's own writer starts a multiprocessing Manager, which imports the entry script again and hangs where that
script has no `__main__` guard; and when rank 0 cannot write the metadata, its other ranks wait forever. Here the plan
is Megatron-Core's, each rank writes in a thread of its own, and nothing that can fail on one rank alone is done between
collectives. Megatron-Core's loader reads the checkpoints.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_mtp.checkpoint.agreement import describe_error, run_on_rank_0
from megatron_mtp.checkpoint.content import COMMON_KEY
from megatron_mtp.checkpoint.manifest import (
    CONFIG_NAME,
    METADATA_NAME,
    TRAIN_STATE_NAME,
    FileEntry,
)
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.serialize import to_yaml
from megatron_mtp.errors import CheckpointError
from megatron_mtp.mcore.checkpoint import to_torch_items
from megatron_mtp.mcore.kept_buffers import KeptBuffers
from megatron_mtp.storage.place import Place, files_in, new_file, write_durably

Payload = torch.Tensor | io.BytesIO


@dataclass(slots=True)
class RankFile:
    """What one rank writes, and on rank 0 the metadata of all ranks; places in the files are filled in later.

    Attributes:
        is_snapshot: training goes on while it is written, and needs the processor.
    """

    items: list[tuple[WriteItem, Payload]]
    metadata: Metadata | None
    is_snapshot: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """Result of writing one rank's file; `error` None: it is on the disk. A rank without main replicas writes none."""

    results: list[WriteResult]
    entry: FileEntry | None
    error: str | None = None


def plan_save(state: ShardedStateDict) -> RankFile:
    """What this rank writes; payloads are views of live tensors. A collective that touches no file.

    Megatron-Core's `dist_checkpointing.save` up to the point where bytes would be written, but for its look into the
    folder: it looks on rank 0 only, and where the folder is gone, the other ranks would wait for that rank forever.

    Raises:
        CheckpointError: on all ranks, if rank 0 cannot join the plans.
    """
    shards, common = save_preprocess(state)
    shards[COMMON_KEY] = ShardedObject(COMMON_KEY, common, (1,), (0,), replica_id=dist.get_rank())
    planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    is_first = dist.get_rank() == 0
    planner.set_up_planner(to_torch_items(shards), is_coordinator=is_first)
    local = planner.create_local_plan()
    plans: list[Any] | None = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(local, plans, dst=0)
    metadata = None

    def join() -> None:
        nonlocal metadata
        try:
            metadata = planner.create_global_plan(plans)[1]
        except Exception as error:
            raise CheckpointError(f"the ranks' shards do not fit together ({describe_error(error)}).") from error

    run_on_rank_0(join)
    plan = planner.finish_plan(local)
    return RankFile([(item, planner.resolve_data(item)) for item in plan.items], metadata)


def snapshot(file: RankFile, live_storages: set[int], buffers: KeptBuffers) -> None:
    """Copies every payload whose memory training continues to write to, so that the file can be written later.

    Args:
        buffers: hold the copies. The file must be written before their next `start`.
    """
    file.is_snapshot = True
    file.items = [
        (item, _copied(payload, live_storages, buffers) if isinstance(payload, torch.Tensor) else payload)
        for item, payload in file.items
    ]


def _copied(tensor: torch.Tensor, live_storages: set[int], buffers: KeptBuffers) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() not in live_storages:
        return tensor
    return buffers.take(tensor.shape, tensor.dtype).copy_(tensor)


def write(file: RankFile, directory: Place, rank: int) -> Written:
    """Writes and syncs this rank's file. Never raises: the other ranks wait for the outcome."""
    if not file.items:
        return Written([], None)
    path = directory / f"__{rank}_0.distcp"
    try:
        with new_file(path) as raw, _without_crc32(), ThreadPoolExecutor(1) as thread:
            stream = HashedStream(raw, None if file.is_snapshot else thread)
            results = [_write_item(stream, path.name, item, payload) for item, payload in file.items]
        size = path.stat().st_size
        if size != stream.position:
            raise OSError(f"{size} of {stream.position} bytes arrived")
        return Written(results, FileEntry(path.name, size, stream.digest.hexdigest()))
    except Exception as error:
        return Written([], None, f"rank {rank}, {path}: {describe_error(error)}")


def _write_item(stream: HashedStream, file_name: str, item: WriteItem, payload: Payload) -> WriteResult:
    start = stream.position
    if isinstance(payload, io.BytesIO):
        stream.write(payload.getbuffer())
    else:
        save_tensor(payload.detach().to("cpu"), stream)
    length = stream.position - start
    return WriteResult(item.index, length, _StorageInfo(file_name, start, length))


def save_tensor(tensor: torch.Tensor, stream: HashedStream) -> None:
    """Appends one tensor on the CPU in the form that loaders of distributed checkpoints read.

    Raises:
        OSError: the disk refused. torch's zip writer then raises its own error, "unexpected pos 704 vs 598".
    """
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # torch.save writes the full storage of a view
    try:
        torch.save(tensor, cast(IO[bytes], stream))
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class HashedStream:
    """Counts and hashes the bytes that are written, so that the manifest holds what was meant, not what arrived.

    Args:
        raw: a file; unbuffered where it is large, since the bytes would be copied once more.
        thread: hashes while the same bytes are written; None: before.
    """

    def __init__(self, raw: io.RawIOBase | io.BufferedIOBase, thread: ThreadPoolExecutor | None = None):
        self.raw, self.position, self.digest, self._thread = raw, 0, hashlib.sha256(), thread

    def write(self, data: Any) -> int:
        """Writes all bytes and adds them to the digest."""
        size = memoryview(data).nbytes
        if self._thread is None or size < 2**16:
            self.digest.update(data)
            self._write_all(data)
        else:
            hashing = self._thread.submit(self.digest.update, data)
            self._write_all(data)
            hashing.result()
        self.position += size
        return size

    def _write_all(self, data: Any) -> None:
        rest = memoryview(data).cast("B")
        while len(rest):
            rest = rest[self.raw.write(rest) or 0 :]

    def flush(self) -> None:
        """Nothing is held back."""


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Inside, torch.save computes no CRC32, which takes as long as half of the hash; torch.load never looks at it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_shared_files(
    directory: Place, cfg: ConfigContainer, state: dict[str, Any], metadata: Metadata | None, written: list[Written]
) -> list[FileEntry]:
    """Writes what a checkpoint holds beside the ranks' files, on rank 0: config, state and metadata.

    Args:
        state: for train_state.json.
        metadata: by which a loader finds each shard.
        written: of every rank.

    Returns:
        Every file of the checkpoint, for its manifest.

    Raises:
        OSError: the disk refused, or a rank's file is not where rank 0 looks.
    """
    entries = [one.entry for one in written if one.entry]
    there = files_in(directory)
    for entry in entries:
        if entry.name not in there:
            raise OSError(f"{directory / entry.name} was written but is not here: ranks must share the file system")
    small = {
        CONFIG_NAME: to_yaml(cfg).encode(),
        TRAIN_STATE_NAME: (json.dumps(state, indent=1) + "\n").encode(),
    }
    return [*_write_small(directory, small), *write_metadata(directory, metadata, written), *entries]


def _write_small(directory: Place, contents: dict[str, bytes]) -> list[FileEntry]:
    for name, content in contents.items():
        write_durably(directory / name, content)
    # What was meant, not what arrived.
    return [FileEntry(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()]


def write_metadata(directory: Place, metadata: Metadata | None, written: list[Written]) -> list[FileEntry]:
    """Writes by which a loader finds each shard in the files that were written. Returns the new files."""
    assert metadata is not None, "the metadata is on rank 0"
    metadata.version = CURRENT_DCP_VERSION
    metadata.storage_meta = StorageMeta()
    metadata.storage_data = {result.index: result.storage_data for one in written for result in one.results}
    form = json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode()
    return _write_small(directory, {METADATA_NAME: pickle.dumps(metadata), CONFIG_FNAME: form})


NICENESS = 10
"""Niceness of the writing thread. Hashing and copying take a core for seconds; where no core is free, training has
priority. Not 19, since a thread that hardly ever runs could keep the interpreter's lock for long."""


class BackgroundWrite:
    """`write` in a thread. The thread ends with the process: a file that is not finished is in no manifest."""

    def __init__(self, file: RankFile, directory: Place, rank: int):
        self._written: Written | None = None

        def work() -> None:
            _give_way()
            self._written = write(file, directory, rank)
            file.items.clear()  # frees the snapshot as soon as it is on the disk

        self._thread = threading.Thread(target=work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether `result` returns at once."""
        return not self._thread.is_alive()

    def result(self) -> Written:
        """Waits for the outcome."""
        self._thread.join()
        return self._written or Written([], None, "the writing thread died")


def _give_way() -> None:
    """Lowers the priority of this thread, on systems where threads have their own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
