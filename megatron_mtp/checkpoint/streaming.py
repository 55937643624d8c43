"""Writes a checkpoint of weights box by box, in one process without process groups or a model.

Conversion from other formats uses it. A run loads what is written here at any layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from megatron_mtp.checkpoint.agreement import describe_error
from megatron_mtp.checkpoint.boxes import FILE_BYTES, BoxWriter
from megatron_mtp.checkpoint.directory import RunDirectory
from megatron_mtp.checkpoint.kept_files import KEPT_FOLDER, copy_files, model_files
from megatron_mtp.checkpoint.manifest import (
    Manifest,
)
from megatron_mtp.checkpoint.writer import write_shared_files
from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import CheckpointError
from megatron_mtp.storage.place import Place, remove_tree


@dataclass(slots=True)
class WeightsWriter:
    """Writes a checkpoint of weights only. Use it in a `with` block: after an exception no files are left.

    Attributes:
        path: run directory; made if it is missing, and must hold no checkpoint.
        file_bytes: a file that exceeds this is followed by another.

    Raises:
        CheckpointError: the directory cannot be written or holds a checkpoint.
    """

    path: Place
    file_bytes: int = FILE_BYTES
    iteration: int = 0
    _made: bool = False
    _kept: Place | None = None
    _boxes: BoxWriter | None = None

    def __enter__(self) -> WeightsWriter:
        directory = RunDirectory(self.path)
        if directory.iterations():
            raise CheckpointError(f"{self.path}: holds a checkpoint already. Choose another directory.")
        self._made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._boxes = BoxWriter(directory.begin(self.iteration), self.file_bytes)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({describe_error(error)}).") from error
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._boxes is not None:
            self._boxes.close()
        if kind is not None:
            RunDirectory(self.path).abandon(self.iteration)
            if self._kept is not None:
                remove_tree(self._kept)
            if self._made and isinstance(self.path, Path) and not any(self.path.iterdir()):
                self.path.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(f"{self.path}: the checkpoint was not written ({describe_error(error)}).") from error

    def add(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], box: Tensor) -> None:
        """Writes one box of a tensor, as `BoxWriter.add`."""
        assert self._boxes is not None, "only in a `with` block"
        self._boxes.add(key, shape, offset, box)

    def keep(self, source: Path) -> None:
        """Copies tokenizer and model files of a folder to RUN/hf."""
        kept = self.path / KEPT_FOLDER
        self._kept = None if kept.exists() else kept
        copy_files(source, kept, model_files(source))

    def complete(
        self,
        cfg: ConfigContainer,
        train_state: dict[str, Any],
        *,
        reason: str,
        tokenizer: str | None = None,
        optimizer_step: int | None = None,
    ) -> Place:
        """Completes the checkpoint; returns its folder.

        Args:
            cfg: finalized config of the model.
            train_state: of `TrainState.to_dict`.
            tokenizer: fingerprint of the run's tokenizer.
            optimizer_step: updates of an optimizer whose tensors were added; None: there are none.
        """
        assert self._boxes is not None, "only in a `with` block"
        metadata, written = self._boxes.finish({})
        directory = RunDirectory(self.path)
        partial = directory.partial_path(self.iteration)
        state = {"train": train_state, "optimizer": {"step": optimizer_step, "grad_scaler": None}}
        files = write_shared_files(partial, cfg, state, metadata, written)
        # No run has world size 0, so that none restores random state from here.
        manifest = Manifest(iteration=self.iteration, files=files, world_size=0, reason=reason, tokenizer=tokenizer)
        return directory.complete(replace(manifest, consumed_samples=train_state["consumed_samples"]))
