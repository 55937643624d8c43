"""Decides, before any process group exists, whether a run starts fresh, resumes, or must not start.

Reads manifests and the saved config, leaves no files, imports neither torch nor megatron.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from megatron_mtp.checkpoint.compat import ConfigDifferences, compare, compare_weights
from megatron_mtp.checkpoint.depth_change import DepthChange
from megatron_mtp.checkpoint.directory import RunDirectory, checkpoint_folder, resume_candidates, split_name, why_empty
from megatron_mtp.checkpoint.manifest import CONFIG_NAME, Manifest, read_manifest
from megatron_mtp.checkpoint.train_state import read_train_state
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.blend import parse_blend
from megatron_mtp.config.derive import WHEN_NULL
from megatron_mtp.config.phases import BASE
from megatron_mtp.config.serialize import to_dict
from megatron_mtp.config.yaml_text import load_yaml
from megatron_mtp.data.sources import data_fingerprints
from megatron_mtp.data.tokenizer import configured_tokenizer
from megatron_mtp.errors import CheckpointError, ConfigError
from megatron_mtp.parallel.params import linear_pattern
from megatron_mtp.storage.address import is_address
from megatron_mtp.storage.place import Place, place, try_writing
from megatron_mtp.storage.remote_path import RemotePath

logger = logging.getLogger(__name__)

BRANCH = (
    "For a branch of another run that restarts by itself, copy the folder of its checkpoint (iter_...) into a new "
    "directory and set both checkpoint.load and checkpoint.save to that directory."
)
"""How a restartable job goes on from another run's checkpoint."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a run resumes."""

    iteration: int
    consumed_samples: int
    damaged: list[str]
    """The problem of each newer checkpoint that is skipped."""
    changes: list[str]
    """Config changes that are allowed and change the loss curve."""


def check_run_directory(cfg: ConfigContainer, phase: str = BASE) -> ResumePoint | None:
    """Where `cfg` resumes; None: a fresh start. Large files are not read here, their checksums are compared at resume.

    Args:
        cfg: finalized.
        phase: name of the phase that it is for; see `progress.find_phase`.

    Raises:
        CheckpointError: `save` cannot be written or holds another run; `load` holds no complete checkpoint, or
            a run with an incompatible config.
    """
    save, load = cfg.checkpoint.save, cfg.checkpoint.load
    if save is not None:
        _check_writable(save)
        check_unused(cfg)
    if load is None:
        check_pretrained(cfg, phase)
        return None
    directory, iterations = resume_candidates(load)
    manifest, damaged = directory.newest_listed(iterations)
    if manifest is None:
        check_missing(cfg, damaged)
        check_pretrained(cfg, phase)
        return None
    comparison = compare_with_run(cfg, directory, manifest, phase)
    if comparison.refusals:
        raise CheckpointError(refusal_text(load, manifest.iteration, comparison))
    return ResumePoint(manifest.iteration, manifest.consumed_samples, damaged, comparison.changes)


def is_same_directory(save: str | None, load: str | None) -> bool:
    """Whether both name one directory, by whatever path."""
    if save is None or load is None or is_address(save) != is_address(load):
        return False
    return place(save) == place(load) if is_address(save) else os.path.realpath(save) == os.path.realpath(load)


def check_missing(cfg: ConfigContainer, damaged: list[str]) -> None:
    """Raises unless checkpoint.load is the empty or absent checkpoint.save directory, which means a fresh start.

    Raises:
        CheckpointError: it is not; names every damaged checkpoint.
    """
    load = cfg.checkpoint.load
    if damaged:
        raise CheckpointError(
            f"checkpoint.load = {load}: none of its checkpoints is complete, so there is nothing to resume from, and a "
            "fresh start there could lose what is left. Restore one, or choose another directory.\n"
            + "\n".join(damaged)
        )
    if cfg.checkpoint.exit_on_missing_checkpoint or not is_same_directory(cfg.checkpoint.save, load):
        raise CheckpointError(
            f"checkpoint.load = {load}: {why_empty(load or '')}. Set checkpoint.load to a run's directory, "
            "or leave it unset for a fresh start. For automatic resumes set it to the directory of checkpoint.save."
        )


def compare_with_run(
    cfg: ConfigContainer, directory: RunDirectory, manifest: Manifest, phase: str = BASE
) -> ConfigDifferences:
    """Compares `cfg` with the config in a checkpoint whose small files have been verified.

    Args:
        phase: name of the phase that `cfg` is for.

    Raises:
        CheckpointError: the checkpoint holds no config.
    """
    path = directory.final_path(manifest.iteration) / CONFIG_NAME
    if CONFIG_NAME not in (entry.name for entry in manifest.files):
        raise CheckpointError(f"{path}: is not part of the checkpoint, so the run it belongs to is unknown.")
    saved = read_saved_config(path)
    begins = phase != saved_phase(path.parent, manifest)
    comparison = compare(saved, to_dict(cfg), to_dict(ConfigContainer()), phase_begins=begins)
    comparison.refusals.extend(_copy_refusals(cfg, saved))
    tokenizer = tokenizer_fingerprint(cfg)
    if tokenizer != manifest.tokenizer:
        comparison.refusals.append(
            f"tokenizer.tokenizer_model = {cfg.tokenizer.tokenizer_model!r}: is another tokenizer ({tokenizer}) than "
            f"the checkpoint's ({manifest.tokenizer}). It cannot change within a run."
        )
    for prefix, now, then in _known_data(cfg, saved, manifest, is_same_order=not begins):
        if now == then:
            continue
        text = f"dataset.blend: the files of {prefix} hold other data than those that the checkpoint was trained on."
        if cfg.checkpoint.exit_on_changed_data:
            way_on = "To go on with the new data set checkpoint.exit_on_changed_data=false."
            comparison.refusals.append(f"{text} Put the earlier files back. {way_on}")
        else:
            comparison.changes.append(text)
    return comparison


def _copy_refusals(cfg: ConfigContainer, saved: dict[str, dict[str, Any]]) -> list[str]:
    """Why the trunk's last layer cannot become an MTP layer."""
    change = DepthChange.between(saved.get("model") or {}, to_dict(cfg)["model"])
    is_copy = change.has_new and cfg.model.mtp_new_layers_init == "last_layer"
    if not is_copy or not linear_pattern(cfg.model)[-1]:
        return []
    return [
        "model.mtp_new_layers_init = last_layer: the trunk's last layer has linear attention, and an MTP layer has "
        "full attention. Use fresh, or last_depth where the checkpoint has an MTP layer."
    ]


def _known_data(
    cfg: ConfigContainer, saved: dict[str, Any], manifest: Manifest, *, is_same_order: bool
) -> list[tuple[str, str, str]]:
    """(prefix, fingerprint, that in the checkpoint) of the training data of `cfg` that the checkpoint knows too."""
    present = data_fingerprints(cfg)
    if is_same_order:
        return [(prefix, now, then) for (prefix, now), then in zip(present.items(), manifest.data, strict=False)]
    dataset = saved.get("dataset") or {}
    blend = dataset.get("blend") or (dataset.get("blend_per_split") or [None])[0]
    names = [os.path.basename(prefix) for prefix in parse_blend(blend).prefixes] if blend else []
    then = dict(zip(names, manifest.data, strict=False))
    return [(p, now, then[os.path.basename(p)]) for p, now in present.items() if os.path.basename(p) in then]


def saved_phase(folder: Place, manifest: Manifest) -> str:
    """Name of the phase that a checkpoint was saved in.

    Raises:
        CheckpointError: its train state is damaged.
    """
    phases = read_train_state(folder, manifest)[0].get("phases")
    return phases[-1]["name"] if phases else BASE


def read_saved_config(path: Place) -> dict[str, dict[str, Any]]:
    """The config in a checkpoint, section by section, as plain data; values are not checked.

    Fields that `finalize` fills are filled here too: checkpoints may hold null in them.

    Raises:
        CheckpointError: it cannot be read, or has another form.
    """
    try:
        saved = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error
    if not _is_mapping(saved) or not all(map(_is_mapping, saved.values())):
        raise CheckpointError(f"{path}: is not a config: it must hold sections with fields.")
    model = saved.get("model", {})
    for name, value in WHEN_NULL.items():
        if model.get(name) is None:
            model[name] = value
    return saved


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def tokenizer_fingerprint(cfg: ConfigContainer) -> str | None:
    """A hash of the vocabulary and rules of the run's tokenizer; None where the run has none."""
    tokenizer = configured_tokenizer(cfg)
    return None if tokenizer is None else tokenizer.fingerprint()


def check_pretrained(cfg: ConfigContainer, phase: str = BASE) -> None:
    """Checks that checkpoint.pretrained_checkpoint, if it is set, holds weights of this model.

    Args:
        phase: name of the phase with which the run begins.

    Raises:
        CheckpointError: there are none, or the model or the tokenizer is another.
    """
    if cfg.checkpoint.pretrained_checkpoint is None:
        return
    named = f"checkpoint.pretrained_checkpoint = {cfg.checkpoint.pretrained_checkpoint}"
    folder = checkpoint_folder(cfg.checkpoint.pretrained_checkpoint)
    path = folder / CONFIG_NAME
    saved = read_saved_config(path)
    comparison = {"layers_may_change": True, "phase_begins": phase != BASE}
    refusals = compare_weights(saved, to_dict(cfg), to_dict(ConfigContainer()), **comparison)
    refusals += _copy_refusals(cfg, saved)
    known, present = read_manifest(folder).tokenizer, tokenizer_fingerprint(cfg)
    if known is not None and present is not None and known != present:
        refusals.append(f"tokenizer.tokenizer_model = {cfg.tokenizer.tokenizer_model!r}: is another tokenizer.")
    if refusals:
        raise CheckpointError("\n".join([f"{named}: holds the weights of another model.", *refusals]))


def refusal_text(load: str, iteration: int, comparison: ConfigDifferences) -> str:
    """One message for all fields that do not fit."""
    return (
        f"checkpoint.load = {load}: iteration {iteration} belongs to a run with another config. Set these fields back, "
        "or start a new run in another directory.\n" + "\n".join(comparison.refusals)
    )


def check_unused(cfg: ConfigContainer) -> None:
    """Returns if this run may write to checkpoint.save: it continues the run in there, or there is none.

    Raises:
        CheckpointError: it holds checkpoints, and `load` is another directory, an older checkpoint, or none.
    """
    save, load = cfg.checkpoint.save, cfg.checkpoint.load
    if save is None or is_same_directory(save, load):
        return
    iterations = RunDirectory(save).iterations()
    if not iterations:
        return
    run, which = split_name(load) if load is not None else (None, None)
    if which is not None and is_same_directory(save, str(run)):
        start = RunDirectory(save).named(which)
        if start == iterations[0]:
            return
        raise CheckpointError(
            f"checkpoint.load = {load}: checkpoint.save holds newer checkpoints, up to iteration {iterations[0]}; they "
            f"would mix with those of a run that goes on from {start}. Save to another directory, or remove the newer "
            "ones with `megatron-mtp checkpoint rm`."
        )
    if load is None:
        what, branch = "checkpoint.load is not set, so this would be a fresh start in it", ""
    else:
        what, branch = f"checkpoint.load = {load} is another run, whose checkpoints would mix with them", f" {BRANCH}"
    raise CheckpointError(
        f"checkpoint.save = {save}: the directory holds checkpoints already, the newest of iteration {iterations[0]}, "
        f"and {what}. To continue that run set checkpoint.load={save}; for a new run choose another directory.{branch}"
    )


def _check_writable(save: str) -> None:
    folder = place(save)
    if str(folder).startswith("memory://"):
        logger.warning("checkpoint.save = %s: memory ends with this process, and the checkpoints with it", save)
    if not isinstance(folder, RemotePath):
        folder = folder.absolute()
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise CheckpointError(f"checkpoint.save = {save}: {folder} is not a directory. Choose another.")
    try:
        try_writing(folder)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint.save = {save}: {folder} cannot be written ({error.strerror}). Choose another directory."
        ) from error
