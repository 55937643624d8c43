"""Converts a checkpoint of any layout to a Hugging Face folder, with one tensor in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mtp.checkpoint.kept_files import GENERATION_NAME, HF_CONFIG_NAME, kept_folder, tokenizer_of, why_no_text
from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.depths import Depths
from megatron_mtp.convert.hf_config import hf_config_dict
from megatron_mtp.convert.hf_families import family_of, find_family
from megatron_mtp.convert.inventory import FP32_ENDINGS
from megatron_mtp.convert.links import TensorLink, check_form, duplicates, links
from megatron_mtp.convert.names import EMBEDDING, HEAD
from megatron_mtp.convert.new_folder import check_new_folder, new_folder
from megatron_mtp.convert.report import Report
from megatron_mtp.convert.side_files import TOKEN_IDS, token_ids, tokenizer_to_export, write_json, write_tokenizer
from megatron_mtp.convert.tensor_forms import finite, rows_of, to_theirs
from megatron_mtp.convert.tensor_writer import SHARD_BYTES, Planned, TensorWriter
from megatron_mtp.data.tokenizer import Tokenizer, open_tokenizer
from megatron_mtp.errors import ConversionError
from megatron_mtp.model.dtypes import TORCH_DTYPES

HF_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(slots=True)
class _Joined:
    """A tensor of theirs that is made of several of ours."""

    tensor: torch.Tensor
    num_filled: int = 0

    def add(self, link: TensorLink, box: torch.Tensor) -> bool:
        """Copies one of them into its place. Returns whether it was the last."""
        place = rows_of(self.tensor, link)
        place.copy_(box.reshape(place.shape))
        self.num_filled += box.numel()
        return self.num_filled == self.tensor.numel()


@dataclass(frozen=True, slots=True)
class CheckpointModel:
    """A checkpoint whose config and metadata were read, with a link for every exported tensor."""

    weights: StoredWeights
    cfg: ConfigContainer
    family: str
    config: dict[str, Any]
    """The architecture as in config.json."""
    links: list[TensorLink]
    num_depths: int
    dtype: torch.dtype
    dropped: list[str]
    """Keys of MTP layers that are not exported."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of theirs with its name, in its stored dtype."""
        joined: dict[str, _Joined] = {}
        for link in self.links:
            if not link.theirs:
                continue
            box = self.weights.read(link.key, link.offset, link.size)
            if link.arrangement != "part":
                for hf, tensor in zip(link.theirs, to_theirs(link, box, self.cfg.model), strict=True):
                    yield hf.name, finite(tensor, hf.name, self.weights.folder)
                continue
            (hf,) = link.theirs
            target = joined.setdefault(hf.name, _Joined(torch.empty(hf.shape, dtype=box.dtype)))
            if target.add(link, box):
                yield hf.name, finite(joined.pop(hf.name).tensor, hf.name, self.weights.folder)
        assert not joined, f"incomplete: {sorted(joined)[:5]}"

    def dtype_of(self, name: str, stored: torch.dtype) -> torch.dtype:
        """Dtype of an exported tensor."""
        return stored if name.endswith(FP32_ENDINGS) else self.dtype


@dataclass(frozen=True, slots=True)
class _ExportedTokenizer:
    """The tokenizer of an export, and what its files follow from.

    Attributes:
        path: folder or tokenizer.json; None: none is written.
        eod: id and text of the token that ends a document; None: it is not known.
        imported: folder with the config.json that came with an imported model; None: there is none.
    """

    path: Path | None
    eod: tuple[int, str] | None
    imported: Path | None

    @classmethod
    def of(cls, model: CheckpointModel, named: Path | None, *, is_written: bool) -> _ExportedTokenizer:
        """The named one, or the run's."""
        folder = model.weights.folder
        path = tokenizer_to_export(model.cfg, folder, named) if is_written else None
        candidates = [place for place in (path, kept_folder(folder)) if place is not None]
        imported = next((place for place in candidates if (place / HF_CONFIG_NAME).is_file()), None)
        return cls(path, _end_of_document(model, named, path), imported)


def export_hf(
    checkpoint: str | Path,
    hf_dir: str | Path,
    *,
    family: str | None = None,
    mtp_depths: int | None = None,
    mtp_duplicates: bool = True,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    with_tokenizer: bool = True,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = True,
) -> Report:
    """Writes weights, config, tokenizer and generation settings as files of a family.

    Args:
        checkpoint: run directory (its newest checkpoint), or the folder of one checkpoint.
        hf_dir: folder to create; if it exists it must be empty.
        family: family of the files; None: the one that fits the architecture.
        mtp_depths: MTP layers to write; None: all. The report names the others.
        mtp_duplicates: write copies of embedding and head for each depth, as in the family's released files.
        dtype: fp32, bf16 or fp16; None: as stored.
        tokenizer: folder or tokenizer.json; None: the run's.
        with_tokenizer: whether to write a tokenizer.
        shard_bytes: most bytes per file.
        verify: first compare every byte of the checkpoint with its manifest.

    Raises:
        ConversionError, CheckpointError: names everything that does not fit; nothing is left behind.
    """
    target = check_new_folder(hf_dir)
    model = plan_checkpoint(Path(checkpoint), family, mtp_depths, dtype, verify=verify)
    exported = _ExportedTokenizer.of(model, Path(tokenizer) if tokenizer else None, is_written=with_tokenizer)
    config = _config(model, exported)
    report = Report(str(checkpoint), str(hf_dir), model.family)
    if with_tokenizer and (reason := _why_no_tokenizer(model.cfg, exported.path)) is not None:
        report.notes.append(reason)
    with new_folder(target) as partial:
        copies = duplicates(model.family, model.cfg.model, model.num_depths) if mtp_duplicates else {}
        _write_weights(model, partial, copies, shard_bytes)
        write_json(partial / HF_CONFIG_NAME, config)
        report.files = [HF_CONFIG_NAME, *_write_side_files(partial, exported, config)]
    _fill_report(model, copies, report)
    return report


def plan_checkpoint(
    path: Path, family: str | None, mtp_depths: int | None, dtype: str | None, *, verify: bool = True
) -> CheckpointModel:
    """Reads config and metadata of a checkpoint and compares them. Arguments and errors as `export_hf`."""
    weights = StoredWeights(path, verify=verify)
    cfg = weights.config()
    name = family or family_of(cfg.model)
    own = Depths.of(cfg.model).distinct
    depths = own if mtp_depths is None else mtp_depths
    if depths > own:
        raise ConversionError(f"--mtp-depths {depths}: {weights.folder} holds {own} MTP layers.")
    if depths:
        check_form(cfg.model, name, depths)
    shown = cfg.copy()
    shown.model.mtp_num_layers = depths
    config = hf_config_dict(shown.model, name)
    found = links(cfg.model, name, depths)
    dropped = sorted(key for key in weights.tensors if _depth_of(key) >= depths)
    _check_keys(weights, found, dropped)
    stored = _stored_dtype(weights, found)
    return CheckpointModel(weights, cfg, name, config, found, depths, TORCH_DTYPES[dtype] if dtype else stored, dropped)


def _depth_of(key: str) -> int:
    """Index of the MTP layer of a tensor, from 0; -1 for the trunk."""
    return int(key.split(".")[2]) if key.startswith("mtp.layers.") else -1


def _check_keys(weights: StoredWeights, found: list[TensorLink], dropped: list[str]) -> None:
    shapes = {link.key: link.shape for link in found}
    problems = [f"{key} is missing." for key in sorted(shapes.keys() - weights.tensors.keys())]
    problems += [
        f"{key} has no name in the family's files."
        for key in sorted(weights.tensors.keys() - shapes.keys() - set(dropped))
    ]
    problems += [
        f"{key} has shape {list(weights.shape(key))}, the config needs {list(shapes[key])}."
        for key in sorted(shapes.keys() & weights.tensors.keys())
        if weights.shape(key) != shapes[key]
    ]
    if problems:
        raise ConversionError("\n".join([f"{weights.folder}: nothing was written.", *problems[:20]]))


def _stored_dtype(weights: StoredWeights, found: list[TensorLink]) -> torch.dtype:
    """Dtype of the weights, without tensors that always stay in fp32."""
    kinds: dict[torch.dtype, str] = {}
    for link in found:
        if link.theirs and not link.theirs[0].name.endswith(FP32_ENDINGS):
            kinds.setdefault(weights.dtype(link.key), link.key)
    if len(kinds) != 1 or next(iter(kinds)) not in HF_DTYPES:
        shown = ", ".join(f"{key} is {dtype}" for dtype, key in kinds.items())
        raise ConversionError(f"{weights.folder}: all weights must be fp32, bf16 or fp16; here {shown}.")
    return next(iter(kinds))


def _write_weights(model: CheckpointModel, folder: Path, copies: dict[str, str], shard_bytes: int) -> None:
    subfolder = find_family(model.family).mtp_form.folder
    planned: dict[str, Planned] = {}
    places: dict[str, Path] = {}
    for link in model.links:
        place = folder / subfolder if subfolder is not None and _depth_of(link.key) >= 0 else folder
        for hf in link.theirs:
            dtype = model.dtype_of(hf.name, model.weights.dtype(link.key))
            planned[hf.name] = Planned(hf.name, dtype, hf.shape)
            places[hf.name] = place
    planned |= {name: Planned(name, model.dtype, planned[of].shape) for name, of in copies.items()}
    repeats: dict[str, list[str]] = {}
    for name, of in copies.items():
        repeats.setdefault(of, []).append(name)
    writers: dict[Path, TensorWriter] = {}
    for place in dict.fromkeys(places.values()):
        place.mkdir(exist_ok=True)
        tensors = [tensor for name, tensor in planned.items() if places.get(name, folder) == place]
        writers[place] = TensorWriter(place, tensors, shard_bytes)
    for name, tensor in model.tensors():
        value = tensor.to(model.dtype_of(name, tensor.dtype))
        for written in (name, *repeats.get(name, ())):
            writers[places.get(written, folder)].write(written, value)
    for writer in writers.values():
        writer.close()


def _config(model: CheckpointModel, exported: _ExportedTokenizer) -> dict[str, Any]:
    config = model.config | token_ids(exported.imported, exported.eod)
    name = HF_DTYPES[model.dtype]
    return {**config, "dtype": name, "torch_dtype": name}  # transformers reads the second up to 4.55


def _end_of_document(model: CheckpointModel, named: Path | None, tokenizer: Path | None) -> tuple[int, str] | None:
    """Id and text of the end-of-document token of the exported tokenizer; None if it cannot be opened."""
    if tokenizer is None or (tokenizer.is_dir() and why_no_text(tokenizer) is not None):
        return None
    if named is not None:
        opened: Tokenizer | None = open_tokenizer("huggingface", str(tokenizer))
    else:
        opened = tokenizer_of(model.cfg, model.weights.folder, model.weights.manifest.tokenizer)
    return None if opened is None else (opened.eod, opened.decode([opened.eod]))


def _why_no_tokenizer(cfg: ConfigContainer, tokenizer: Path | None) -> str | None:
    """What the caller should know about the exported tokenizer; None: transformers reads it."""
    if tokenizer is not None:
        has_code = tokenizer.is_dir() and any(tokenizer.glob("*.py"))
        return "The tokenizer needs its own code: load it with trust_remote_code=True." if has_code else None
    section = cfg.tokenizer
    whose = "The run has none" if section.tokenizer_type == "null" else f"The run's is of type {section.tokenizer_type}"
    return f"No tokenizer was written. {whose}; --tokenizer adds a Hugging Face tokenizer."


def _write_side_files(folder: Path, exported: _ExportedTokenizer, config: dict[str, Any]) -> list[str]:
    names = [] if exported.path is None else write_tokenizer(exported.path, folder, exported.eod)
    if exported.imported is not None and (exported.imported / GENERATION_NAME).is_file():
        shutil.copyfile(exported.imported / GENERATION_NAME, folder / GENERATION_NAME)
    else:
        settings: dict[str, Any] = {key: config[key] for key in TOKEN_IDS if key in config}
        write_json(folder / GENERATION_NAME, {"_from_model_config": True, **settings})
    return [*names, GENERATION_NAME]


def _fill_report(model: CheckpointModel, copies: dict[str, str], report: Report) -> None:
    carried = [link for link in model.links if link.theirs]
    report.read = sorted({link.key for link in carried})
    report.written = sorted({hf.name for link in carried for hf in link.theirs})
    report.duplicated = sorted(copies)
    subfolder = find_family(model.family).mtp_form.folder
    if model.num_depths and subfolder is not None:
        report.notes.append(
            f"{model.num_depths} MTP layers are in {subfolder}/: transformers, vLLM and SGLang serve the model without "
            f"them, since they have no drafter for {model.family}; `megatron-mtp generate` drafts with them."
        )
    report.padded = sorted({link.key for link in model.links if not link.theirs})
    report.left_out = [*model.dropped, *(f"{count} of {kind}" for kind, count in model.weights.left_out.items())]
    if model.cfg.model.share_embeddings_and_output_weights:
        report.tied = [f"{HEAD} (is {EMBEDDING})"]
