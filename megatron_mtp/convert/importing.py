"""A Hugging Face folder -> a checkpoint that a run of any layout loads. One tensor is in memory at a time."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mtp.checkpoint.preflight import tokenizer_fingerprint
from megatron_mtp.checkpoint.streaming import WeightsWriter
from megatron_mtp.checkpoint.train_state import TrainState
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.accounts import Accounts, hold
from megatron_mtp.convert.hf_config import family_of, hf_config_dict, model_config_from_hf
from megatron_mtp.convert.hf_families import ALIASES
from megatron_mtp.convert.links import Link, duplicates, grown_links, links, own_depths
from megatron_mtp.convert.names import EMBEDDING, HEAD
from megatron_mtp.convert.report import Report
from megatron_mtp.convert.side_files import KEPT_FOLDER, keep, read_config
from megatron_mtp.convert.tensor_files import DTYPES, TensorFiles
from megatron_mtp.convert.tensor_forms import to_ours
from megatron_mtp.convert.warm_start import MTPInit, new_value
from megatron_mtp.errors import ConversionError
from megatron_mtp.recipes.common import pretrain_common

DTYPE_NAMES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
# What config.json says and a recipe may say otherwise: it does not change what the weights mean.
_OF_TRAINING = ("initializer_range", "router_aux_loss_coef", "max_position_embeddings")


@dataclass(frozen=True, slots=True)
class HFModel:
    """A folder that was read as far as needed to plan: config, links, and what its tensors are.

    Args:
        cfg: finalized, with as many depths as the result will have.
        links: of every tensor that comes from the files.
        grown: links of new MTP layers, and whether they copy.
    """

    folder: Path
    family: str
    cfg: ConfigContainer
    files: TensorFiles
    accounts: Accounts
    links: list[Link]
    grown: list[tuple[Link, bool]]

    def read(self, link: Link) -> torch.Tensor:
        """The box of `link`, from the files; zeros where it has no sources."""
        if not link.sources:
            return torch.zeros(link.size, dtype=DTYPES[self.accounts.dtype])
        tensors = [self.files.read(source.name) for source in link.sources]
        return to_ours(link, tensors, self.cfg.model)

    def grow(self, link: Link, copies: bool, init: MTPInit | None) -> torch.Tensor:
        """The box of a link of a new MTP layer."""
        if copies and init == "last_layer":
            return self.read(link)
        return new_value(link, self.cfg, DTYPES[self.accounts.dtype])


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
        hf_dir: config.json, safetensors and what lies beside them.
        out_dir: run directory, without checkpoints.
        cfg: a recipe whose architecture is that of config.json; it is saved with the weights. None: defaults.
        mtp_depths: depths of the result; None: those of `cfg`, or of the files.
        mtp_init: how depths beyond those in the files are made; None: there must be none.

    Raises:
        ConversionError: everything that does not fit, by name; nothing is left behind.
        CheckpointError: `out_dir` cannot be written or holds a checkpoint.
    """
    out = Path(out_dir)
    source = plan_hf(Path(hf_dir), cfg, mtp_depths=mtp_depths, mtp_init=mtp_init)
    report = Report(str(hf_dir), str(out_dir), source.family)
    kept = out / KEPT_FOLDER
    existed = kept.exists()
    try:
        with WeightsWriter(out) as writer:
            for link in source.links:
                writer.add(link.key, link.whole, link.offset, source.read(link))
            for link, copies in source.grown:
                writer.add(link.key, link.whole, link.offset, source.grow(link, copies, mtp_init))
            report.files = [f"{KEPT_FOLDER}/{name}" for name in keep(source.folder, kept)]
            final = _with_tokenizer(source.cfg, kept)
            writer.complete(final, TrainState().to_dict(), reason="imported", tokenizer=tokenizer_fingerprint(final))
    except BaseException:
        if not existed:
            shutil.rmtree(kept, ignore_errors=True)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise
    _account(source, report)
    return report


def plan_hf(
    folder: Path,
    cfg: ConfigContainer | None = None,
    *,
    mtp_depths: int | None = None,
    mtp_init: MTPInit | None = None,
) -> HFModel:
    """Reads config and headers of a folder and checks them against each other. Arguments and errors as `import_hf`."""
    values = read_config(folder)
    model = model_config_from_hf(values)
    family = ALIASES.get(str(values["model_type"]), str(values["model_type"]))
    files = TensorFiles(folder)
    present = own_depths(model)
    if present and not _holds_depths(files, model, family):
        present = 0  # transformers saves the count and not the layers
    cfg = _resolved(
        model, family, values, cfg, present if mtp_depths is None else mtp_depths, keep_depths=mtp_depths is None
    )
    wanted = own_depths(cfg.model)
    _check_depths(folder, present, wanted, mtp_depths, mtp_init)
    used = min(present, wanted)
    found = links(cfg.model, family, used)
    everything = {source.name for link in links(model, family, present) for source in link.sources}
    needed = {source.name for link in found for source in link.sources}
    accounts = hold(
        files,
        found,
        declared_dtype=values.get("dtype") or values.get("torch_dtype"),
        duplicates=duplicates(family, model, present),
        tied={HEAD: EMBEDDING} if model.share_embeddings_and_output_weights else {},
        dropped=everything - needed,
    )
    final = cfg.copy()
    final.precision.dtype = DTYPE_NAMES[accounts.dtype]
    final.finalize(None)
    grown = [pair for depth_idx in range(used, wanted) for pair in grown_links(final.model, family, depth_idx)]
    return HFModel(folder, family, final, files, accounts, links(final.model, family, used), grown)


def _holds_depths(files: TensorFiles, model: ModelConfig, family: str) -> bool:
    of_trunk = {source.name for link in links(model, family, 0) for source in link.sources}
    of_depths = {s.name for link in links(model, family, own_depths(model)) for s in link.sources} - of_trunk
    return bool(of_depths & files.entries.keys())


def _check_depths(folder: Path, present: int, wanted: int, chosen: int | None, init: MTPInit | None) -> None:
    if wanted > present and init is None:
        raise ConversionError(
            f"model.mtp_num_layers = {wanted}: {folder} holds {present or 'no'} MTP layers. Make the others with --mtp-init "
            "last_layer or fresh, or import with --mtp-depths "
            f"{present}."
        )
    if wanted < present and chosen is None:
        raise ConversionError(
            f"model.mtp_num_layers = {wanted}: {folder} holds {present} MTP layers. Set it to {present}, or leave them out with "
            f"--mtp-depths {wanted}."
        )


def _resolved(
    model: ModelConfig,
    family: str,
    values: dict[str, Any],
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
        _check_recipe(cfg, model, family, values)
    return cfg


def _check_recipe(cfg: ConfigContainer, model: ModelConfig, family: str, values: dict[str, Any]) -> None:
    other = family_of(cfg.model)
    if other != family and not (cfg.model.num_moe_experts is None and model.num_moe_experts is None):
        raise ConversionError(
            f"The recipe is a {other} model, and config.json describes {family}. Choose another recipe."
        )
    ours, theirs = (_declared(side, family) for side in (cfg.model, _finalized(model)))
    wrong = [
        f"{key}: the recipe has {ours.get(key)!r}, config.json means {theirs.get(key)!r}."
        for key in sorted(ours.keys() | theirs.keys())
        if not _same(ours.get(key), theirs.get(key))
    ]
    if wrong:
        raise ConversionError("\n".join(["The recipe is another model than config.json describes.", *wrong]))


def _same(ours: Any, theirs: Any) -> bool:
    """Equal, or numbers that some format has rounded to fp32."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


def _declared(model: ModelConfig, family: str) -> dict[str, Any]:
    cfg = ConfigContainer(model=model).copy()
    cfg.model.mtp_num_layers = 0
    return {key: value for key, value in hf_config_dict(cfg.model, family).items() if key not in _OF_TRAINING}


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


def _account(source: HFModel, report: Report) -> None:
    """Fills the lists of the report and checks that no tensor of the files is in none of them."""
    accounts = source.accounts
    report.read = sorted({s.name for link in source.links for s in link.sources})
    report.written = sorted({link.key for link in source.links} | {link.key for link, _ in source.grown})
    report.padded = sorted({link.key for link in source.links if not link.sources})
    report.made = sorted({link.key for link, _ in source.grown})
    report.tied, report.duplicated, report.left_out = accounts.tied, accounts.duplicated, accounts.ignored
    if source.cfg.model.share_embeddings_and_output_weights and not report.tied:
        report.tied = [f"{HEAD} (is {EMBEDDING})"]
    named = {*report.read, *accounts.tied, *accounts.duplicated, *accounts.ignored}
    left_over = source.files.entries.keys() - named
    assert not left_over, f"neither read nor named: {sorted(left_over)[:5]}"
