"""A `torch_dist` checkpoint of Megatron-LM or Megatron-Bridge: which folder, what it holds, under which names.

RUN/latest_checkpointed_iteration.txt   a number, or "release"; Megatron-Bridge: also latest_train_state.pt
RUN/iter_0001000/.metadata, *.distcp    the tensors, in torch's distributed format
                 metadata.json          {"sharded_backend": "torch_dist", ...}
                 common.pt              iteration, arguments, optimizer groups; newer ones: object "common_state"
                 run_config.yaml, train_state.pt     of Megatron-Bridge
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_mtp.checkpoint.content import COMMON_KEY
from megatron_mtp.checkpoint.directory import LATEST_NAME
from megatron_mtp.checkpoint.manifest import MANIFEST_NAME, METADATA_NAME
from megatron_mtp.checkpoint.stored import StoredTensors
from megatron_mtp.checkpoint.untrusted import read_metadata
from megatron_mtp.config.yaml_text import load_yaml
from megatron_mtp.convert.inert import attributes, read_inert
from megatron_mtp.errors import ConfigError, ConversionError

COMMON_FILE, RUN_CONFIG, TRAIN_STATE = "common.pt", "run_config.yaml", "train_state.pt"
OPTIMIZER_KEY = re.compile(r"optimizer\.state\.(\w+)\.(.+)")
"""Optimizer state by weight, which no layout changes."""
# One weight in Megatron-Core's specs: fused with the linear layer behind it (Transformer Engine), or alone (local).
_SAME = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.q_layernorm."),
    ("self_attention.linear_kv_up_proj.layer_norm_", "self_attention.kv_layernorm."),
    ("mtp_model_layer.", "transformer_layer."),
)
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of ours is stored: a key of theirs, and the index of a layer axis that ours lacks."""

    key: str
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class MegatronCheckpoint:
    """A checkpoint whose metadata and settings were read.

    Args:
        settings: Megatron-LM's arguments, or Megatron-Bridge's section `model`; empty: it has neither.
        iteration: steps done.
        consumed_samples: None: it does not say.
        optimizer_step: updates of the optimizer; None: it does not say.
    """

    folder: Path
    stored: StoredTensors
    settings: dict[str, Any] = field(default_factory=dict)
    iteration: int = 0
    consumed_samples: int | None = None
    optimizer_step: int | None = None

    @classmethod
    def open(cls, path: Path) -> MegatronCheckpoint:
        """Reads everything but the tensors.

        Raises:
            ConversionError: there is no such checkpoint, or it is of another format.
            CheckpointError: its metadata is damaged.
        """
        folder = _iteration_folder(path)
        metadata = read_metadata(folder, is_foreign=True)
        stored = StoredTensors(folder, metadata, with_optimizer=True)
        common = _common_state(folder, metadata)
        settings, samples = _settings(folder, common)
        iteration = common.get("iteration")
        return cls(
            folder,
            stored,
            settings,
            iteration if isinstance(iteration, int) else 0,
            samples,
            _optimizer_step(common),
        )

    def find(self, key: str) -> Place | None:
        """The place of a tensor of ours, an optimizer's included; None: it is not stored."""
        match = OPTIMIZER_KEY.fullmatch(key)
        lead, weight = (key[: match.start(2)], match[2]) if match else ("", key)
        for name in same_weight(weight):
            if lead + name in self.stored.tensors:
                return Place(lead + name)
        layer = _LAYER.fullmatch(weight)
        if layer:
            for name in same_weight(layer[1] + layer[3]):
                if lead + name in self.stored.tensors:
                    return Place(lead + name, int(layer[2]))
        return None


def same_weight(key: str) -> Iterator[str]:
    """The names that Megatron-Core's specs give one weight, the key itself first."""
    yield key
    for fused, alone in _SAME:
        for one, other in ((fused, alone), (alone, fused)):
            if f".{one}" in key:
                yield key.replace(f".{one}", f".{other}", 1)


def _iteration_folder(path: Path) -> Path:
    """The folder of one checkpoint in a run directory, or `path` itself."""
    if (path / MANIFEST_NAME).exists():
        raise ConversionError(f"{path}: is a checkpoint of megatron-mtp already; no conversion is needed.")
    folder = path
    if not (path / METADATA_NAME).exists():
        try:
            latest = (path / LATEST_NAME).read_text(encoding="utf-8").strip()
        except OSError:
            raise ConversionError(
                f"{path}: holds neither {LATEST_NAME} nor {METADATA_NAME}. Give a run directory of Megatron-LM or "
                "Megatron-Bridge, or one of its iter_... folders."
            ) from None
        folder = path / (latest if latest == "release" else f"iter_{int(latest):07d}" if latest.isdigit() else latest)
        if (folder / MANIFEST_NAME).exists():
            raise ConversionError(f"{path}: is a run of megatron-mtp already; no conversion is needed.")
    if not (folder / METADATA_NAME).exists():
        old = any(folder.glob("mp_rank_*"))
        raise ConversionError(
            f"{folder}: "
            + (
                "is in the format torch, one file for each rank. Save it again with --ckpt-format torch_dist."
                if old
                else f"holds no {METADATA_NAME}, so it is no torch_dist checkpoint, or it is not complete."
            )
        )
    try:
        backend = json.loads((folder / "metadata.json").read_text(encoding="utf-8")).get("sharded_backend")
    except (OSError, ValueError, AttributeError) as error:
        raise ConversionError(f"{folder / 'metadata.json'}: cannot be read ({error}).") from error
    if backend != "torch_dist":
        raise ConversionError(f"{folder}: is in the format {backend!r}; only torch_dist is read.")
    return folder


def _common_state(folder: Path, metadata: Any) -> dict[str, Any]:
    """What Megatron-Core stores beside tensors, with nothing in it executed."""
    path = folder / COMMON_FILE
    try:
        if path.exists():
            return attributes(read_inert(path.read_bytes()))
        key = f"{COMMON_KEY}/shard_0_1"
        if key not in metadata.state_dict_metadata:
            return {}
        info = metadata.storage_data[MetadataIndex(key)]
        path = folder / info.relative_path
        with path.open("rb") as stream:
            stream.seek(info.offset)
            value = read_inert(stream.read(info.length))
        return attributes(value[0] if isinstance(value, list) and value else value)
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(f"{path}: its common state cannot be read ({error}).") from error


def _settings(folder: Path, common: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Settings of the model, and consumed samples."""
    arguments = attributes(common.get("args"))
    samples = arguments.get("consumed_train_samples")
    if (folder / TRAIN_STATE).exists():
        samples = attributes(read_inert((folder / TRAIN_STATE).read_bytes())).get("consumed_train_samples", samples)
    settings = arguments
    if (folder / RUN_CONFIG).exists():
        text = (folder / RUN_CONFIG).read_text(encoding="utf-8")
        try:
            settings = load_yaml(text, str(folder / RUN_CONFIG)).get("model") or {}
        except (ConfigError, AttributeError) as error:
            raise ConversionError(f"{folder / RUN_CONFIG}: cannot be read ({error}).") from error
    return settings, samples if isinstance(samples, int) and not isinstance(samples, bool) else None


def _optimizer_step(common: dict[str, Any]) -> int | None:
    """The largest count of updates in an optimizer's groups, at any depth of a chain of optimizers."""
    found: list[int] = []
    pending: list[Any] = [common.get("optimizer")]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            found += [int(item[name]) for name in ("step", "common_step") if isinstance(item.get(name), int | float)]
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    return max(found, default=None)
