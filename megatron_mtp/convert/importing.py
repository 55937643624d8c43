"""Converts a Hugging Face folder to a checkpoint for any layout, with one tensor in memory at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_mtp.checkpoint.kept_files import (
    KEPT_FOLDER,
    model_files,
    why_no_text,
)
from megatron_mtp.checkpoint.preflight import tokenizer_fingerprint
from megatron_mtp.checkpoint.streaming import WeightsWriter
from megatron_mtp.checkpoint.train_state import TrainState
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.depths import MTP_BLOCK, Depths
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.hf_config import hf_config_dict, model_config_from_hf
from megatron_mtp.convert.hf_families import canonical, find_family
from megatron_mtp.convert.inventory import Inventory, check_inventory
from megatron_mtp.convert.links import TensorLink, duplicates, links, new_depth_links
from megatron_mtp.convert.names import EMBEDDING, HEAD
from megatron_mtp.convert.quantization import block_of
from megatron_mtp.convert.report import Report
from megatron_mtp.convert.side_files import read_config
from megatron_mtp.convert.tensor_files import DTYPE_OF_CODE, TensorFiles
from megatron_mtp.convert.tensor_forms import finite, to_ours
from megatron_mtp.convert.warm_start import MTPInit, new_value
from megatron_mtp.errors import ConversionError
from megatron_mtp.recipes.common import pretrain_common

DTYPE_NAMES: dict[str, Literal["fp32", "bf16", "fp16"]] = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
# Keys of config.json that a recipe may change: they do not affect the meaning of the weights.
_TRAINING_KEYS = ("initializer_range", "router_aux_loss_coef", "max_position_embeddings")


@dataclass(frozen=True, slots=True)
class HFModel:
    """A folder whose config and headers were read.

    Args:
        cfg: finalized, with as many depths as the result will have.
        links: every tensor that comes from the files.
        new_links: tensors of new MTP layers, and whether each can be copied from the trunk.
    """

    folder: Path
    family: str
    cfg: ConfigContainer
    files: TensorFiles
    inventory: Inventory
    links: list[TensorLink]
    new_links: list[tuple[TensorLink, bool]]

    def read(self, link: TensorLink) -> torch.Tensor:
        """The box of `link` from the files; zeros if it is padding."""
        if not link.theirs:
            return torch.zeros(link.size, dtype=DTYPE_OF_CODE[self.inventory.dtype])
        names = [hf.name for hf in link.theirs]
        tensors = [finite(self.files.read(name), name, self.folder) for name in names]
        return to_ours(link, tensors, self.cfg.model)

    def initial(self, link: TensorLink, copies: bool, init: MTPInit | None) -> torch.Tensor:
        """The box of `link` in a new MTP layer."""
        if copies and init == "last_layer":
            return self.read(link)
        return new_value(link, self.cfg, DTYPE_OF_CODE[self.inventory.dtype])


def import_hf(
    hf_dir: str | Path,
    out_dir: str | Path,
    cfg: ConfigContainer | None = None,
    *,
    mtp_depths: int | None = None,
    mtp_init: MTPInit | None = None,
) -> Report:
    """Writes a checkpoint of iteration 0 with the weights of a Hugging Face folder.

    Args:
        hf_dir: folder with config.json, safetensors and tokenizer files.
        out_dir: run directory without checkpoints.
        cfg: a recipe with the architecture of config.json, saved with the weights. None: defaults.
        mtp_depths: depths of the result; None: those of `cfg`, or of the files.
        mtp_init: how to initialise depths beyond those in the files; None: there must be none.

    Raises:
        ConversionError: names everything that does not fit; nothing is left behind.
        CheckpointError: `out_dir` is not writable or holds a checkpoint.
    """
    out = Path(out_dir)
    source = plan_hf(Path(hf_dir), cfg, mtp_depths=mtp_depths, mtp_init=mtp_init)
    report = Report(str(hf_dir), str(out_dir), source.family)
    with WeightsWriter(out) as writer:
        for link in source.links:
            writer.add(link.key, link.shape, link.offset, source.read(link))
        for link, copies in source.new_links:
            writer.add(link.key, link.shape, link.offset, source.initial(link, copies, mtp_init))
        writer.keep(source.folder)
        report.files = [f"{KEPT_FOLDER}/{name}" for name in model_files(source.folder)]
        if (reason := why_no_text(source.folder)) is not None:
            report.notes.append(reason)
        if mtp_init == "last_layer" and any(MTP_BLOCK in link.key and not copies for link, copies in source.new_links):
            report.notes.append(
                "the feed-forward blocks of new MTP layers are initialised as in a new model: model.mtp_layer_mlp = "
                f"{source.cfg.model.mtp_layer_mlp!r} gives them another form than that of the trunk's last layer."
            )
        final = _with_tokenizer(source.cfg, Path(out_dir) / KEPT_FOLDER)
        writer.complete(final, TrainState().to_dict(), reason="imported", tokenizer=tokenizer_fingerprint(final))
    _fill_report(source, report)
    return report


def plan_hf(
    folder: Path,
    cfg: ConfigContainer | None = None,
    *,
    mtp_depths: int | None = None,
    mtp_init: MTPInit | None = None,
) -> HFModel:
    """Reads config and headers of a folder and compares them. Arguments and errors as `import_hf`."""
    values = read_config(folder)
    model = model_config_from_hf(values)
    family = canonical(str(values["model_type"]))
    files = TensorFiles(folder, find_family(family).mtp_form.folder, block=block_of(values))
    present = Depths.of(model).distinct
    if present and not _holds_depths(files, model, family):
        present = 0  # transformers saves the count but not the layers
    cfg = _resolved(model, family, cfg, present if mtp_depths is None else mtp_depths, keep_depths=mtp_depths is None)
    wanted = Depths.of(cfg.model).distinct
    _check_depths(folder, present, wanted, mtp_depths, mtp_init)
    used = min(present, wanted)
    found = links(cfg.model, family, used)
    everything = {hf.name for link in links(model, family, present) for hf in link.theirs}
    needed = {hf.name for link in found for hf in link.theirs}
    inventory = check_inventory(
        files,
        found,
        duplicates=duplicates(family, model, present),
        tied={HEAD: EMBEDDING} if model.share_embeddings_and_output_weights else {},
        dropped=everything - needed,
    )
    final = cfg.copy()
    final.precision.dtype = DTYPE_NAMES[inventory.dtype]
    final.finalize(None)
    new_links = [pair for depth_idx in range(used, wanted) for pair in new_depth_links(final.model, family, depth_idx)]
    return HFModel(folder, family, final, files, inventory, links(final.model, family, used), new_links)


def _holds_depths(files: TensorFiles, model: ModelConfig, family: str) -> bool:
    of_trunk = {hf.name for link in links(model, family, 0) for hf in link.theirs}
    of_depths = {hf.name for link in links(model, family, Depths.of(model).distinct) for hf in link.theirs} - of_trunk
    return bool(of_depths & files.entries.keys())


def _check_depths(folder: Path, present: int, wanted: int, chosen: int | None, init: MTPInit | None) -> None:
    if wanted > present and init is None:
        raise ConversionError(
            f"model.mtp_num_layers = {wanted}: {folder} holds {present or 'no'} MTP layers. Initialise the others with "
            f"--mtp-init last_layer or fresh, or import with --mtp-depths {present}."
        )
    if wanted < present and chosen is None:
        raise ConversionError(
            f"model.mtp_num_layers = {wanted}: {folder} holds {present} MTP layers. Set it to {present}, or drop the "
            f"others with --mtp-depths {wanted}."
        )


def _resolved(
    model: ModelConfig,
    family: str,
    recipe: ConfigContainer | None,
    depths: int,
    *,
    keep_depths: bool,
) -> ConfigContainer:
    """A finalized config with the architecture of the files."""
    if recipe is None:
        cfg = pretrain_common()
        cfg.model = model
    else:
        cfg = recipe.copy()
        if cfg.model.vocab_size is None:
            cfg.model.vocab_size = model.vocab_size
    if recipe is None or not keep_depths:
        cfg.model.mtp_num_layers = depths
    cfg.finalize(None)
    if recipe is not None:
        _check_recipe(cfg, model, family)
    return cfg


def _check_recipe(cfg: ConfigContainer, model: ModelConfig, family: str) -> None:
    title = "The recipe does not match config.json. Choose another recipe."
    try:
        ours = _declared(cfg.model, family)
    except ConversionError as error:  # config.json of this family cannot describe the recipe
        raise ConversionError(f"{title}\n{error}") from error
    theirs = _declared(_finalized(model), family)
    wrong = [
        f"{key}: the recipe has {ours.get(key)!r}, config.json means {theirs.get(key)!r}."
        for key in sorted(ours.keys() | theirs.keys())
        if not _same(ours.get(key), theirs.get(key))
    ]
    if wrong:
        raise ConversionError("\n".join([title, *wrong]))


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two values are equal, up to rounding to fp32."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


def _declared(model: ModelConfig, family: str) -> dict[str, Any]:
    cfg = ConfigContainer(model=model).copy()
    cfg.model.mtp_num_layers = 0
    return {key: value for key, value in hf_config_dict(cfg.model, family).items() if key not in _TRAINING_KEYS}


def _finalized(model: ModelConfig) -> ModelConfig:
    cfg = pretrain_common()
    cfg.model = model
    return cfg.copy().finalize(None).model


def _with_tokenizer(cfg: ConfigContainer, kept: Path) -> ConfigContainer:
    final = cfg.copy()
    if (kept / "tokenizer.json").is_file():
        final.tokenizer.tokenizer_type = "huggingface"
        final.tokenizer.tokenizer_model = str(kept.absolute())
        final.tokenizer.vocab_size = None
    return final.finalize(None)


def _fill_report(source: HFModel, report: Report) -> None:
    """Fills the lists of the report and checks that every tensor of the files is in one of them."""
    inventory, dequantized = source.inventory, source.files.scale_names
    if dequantized:
        report.notes.append(
            f"{len(dequantized)} FP8 weights were dequantized to {DTYPE_NAMES[inventory.dtype]}, each block of "
            f"{source.files.block} by its scale; an export does not quantize them again."
        )
    elif source.files.block is not None:
        report.notes.append("config.json says that weights are FP8, and none is: they were read as they are.")
    report.read = source.files.names_in_files(hf.name for link in source.links for hf in link.theirs)
    report.written = sorted({link.key for link in source.links} | {link.key for link, _ in source.new_links})
    report.padded = sorted({link.key for link in source.links if not link.theirs})
    report.made = sorted({link.key for link, _ in source.new_links})
    report.tied, report.duplicated, report.left_out = inventory.tied, inventory.duplicated, inventory.ignored
    if source.cfg.model.share_embeddings_and_output_weights and not report.tied:
        report.tied = [f"{HEAD} (is {EMBEDDING})"]
    named = {*report.read, *inventory.tied, *inventory.duplicated, *inventory.ignored}
    left_over = {*source.files.entries, *source.files.scale_names.values()} - named
    assert not left_over, f"neither read nor named: {sorted(left_over)[:5]}"
