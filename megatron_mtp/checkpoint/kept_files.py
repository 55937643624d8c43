"""Tokenizer and other Hugging Face files that are kept with a run, so that it can be decoded and exported anywhere.

    RUN/hf/    tokenizer files; of an imported model also config.json and generation_config.json

They are copied once. Code among them (tokenization_*.py) is copied too, and never executed. Imports neither torch nor
megatron.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from megatron_mtp.checkpoint.directory import split_name
from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.tokenizer import Tokenizer, configured_tokenizer, open_tokenizer
from megatron_mtp.errors import CheckpointError
from megatron_mtp.storage.place import Place, files_in
from megatron_mtp.storage.remote_path import RemotePath

KEPT_FOLDER = "hf"
HF_CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"
TOKENIZER_NAMES = tuple(
    """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt
    tokenizer.model tiktoken.model tekken.json chat_template.jinja chat_template.json""".split()
)
_CODE = "tokenization_*.py"
_VOCABULARIES = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json")


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the tokenizer files in a folder."""
    names = [name for name in TOKENIZER_NAMES if (folder / name).is_file()]
    return [*names, *sorted(path.name for path in folder.glob(_CODE))]


def model_files(folder: Path) -> list[str]:
    """The same, and config.json and generation_config.json."""
    return [
        *(name for name in (HF_CONFIG_NAME, GENERATION_NAME) if (folder / name).is_file()),
        *tokenizer_files(folder),
    ]


def copy_files(source: Path, target: Place, names: list[str]) -> list[str]:
    """Copies files between folders; makes the second if needed. Returns `names`."""
    if isinstance(target, RemotePath):
        for name in names:
            (target / name).write_bytes((source / name).read_bytes())
        return names
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def why_no_text(folder: Path) -> str | None:
    """Why text cannot be encoded with the files of a Hugging Face folder, and what to do; None: it can."""
    if (folder / "tokenizer.json").is_file():
        return None
    found = next((name for name in _VOCABULARIES if (folder / name).is_file()), None)
    if found is None:
        return f"{folder}: has no tokenizer, so text cannot be encoded. Token ids work."
    code = next(folder.glob(_CODE), None)
    needs = f" {code.name} reads it, and code of a model's folder is never executed here." if code else ""
    return (
        f"{folder}: has the tokenizer file {found} and no tokenizer.json, so text cannot be encoded.{needs} Token ids "
        "work. For text, name a tokenizer.json of this vocabulary; transformers' "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one for many models."
    )


def keep_with_run(cfg: ConfigContainer, run: Place) -> list[str]:
    """Copies the run's tokenizer, and the config of the imported model that it starts from, to RUN/hf.

    Returns:
        The names; none if the run has nothing to keep.

    Raises:
        OSError: a file cannot be copied.
    """
    if isinstance(run, RemotePath):
        with tempfile.TemporaryDirectory(prefix="megatron-mtp-kept-") as folder:
            return copy_files(Path(folder), run / KEPT_FOLDER, _gather(cfg, Path(folder)))
    partial = run / f"{KEPT_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    names = _gather(cfg, partial)
    if names:
        shutil.rmtree(run / KEPT_FOLDER, ignore_errors=True)
        os.rename(partial, run / KEPT_FOLDER)
    return names


def _gather(cfg: ConfigContainer, folder: Path) -> list[str]:
    """Copies all that is to be kept to a folder. Returns the names."""
    section, names = cfg.tokenizer, []
    imported = _kept_beside(cfg.checkpoint.pretrained_checkpoint)
    own = Path(section.tokenizer_model) if section.tokenizer_model else None
    if imported is not None:
        # Its tokenizer files only if the run names no other tokenizer.
        is_wanted = set(model_files(imported)) - set(tokenizer_files(imported) if own is not None else [])
        names += copy_files(imported, folder, sorted(is_wanted))
    if own is not None and own.is_dir():
        names += copy_files(own, folder, model_files(own))
    elif own is not None:
        as_name = own.name
        if section.tokenizer_type == "huggingface":  # what lies beside the file belongs to it
            as_name = "tokenizer.json"
            beside = model_files(own.parent) if own.name == as_name else tokenizer_files(own.parent)
            names += copy_files(own.parent, folder, [name for name in beside if name != as_name])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(own, folder / as_name)
        names.append(as_name)
    return sorted(set(names))


def _kept_beside(checkpoint: str | None) -> Path | None:
    """The kept folder of a run directory, or of the run of one checkpoint."""
    if checkpoint is None:
        return None
    folder, _ = split_name(checkpoint)
    places = (folder / KEPT_FOLDER, folder.parent / KEPT_FOLDER)
    return next((_here(place) for place in places if place.is_dir()), None)


def _here(folder: Place) -> Path:
    """The files of a folder on this machine; of objects, copies that end with the process: a tokenizer opens paths."""
    return _downloaded(folder) if isinstance(folder, RemotePath) else folder


@functools.cache
def _downloaded(folder: RemotePath) -> Path:
    copy = Path(tempfile.mkdtemp(prefix="megatron-mtp-kept-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    try:
        for name in files_in(folder):
            (copy / name).write_bytes((folder / name).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}).") from error
    return copy


def kept_folder(checkpoint: Place) -> Path | None:
    """The folder with the files that are kept for a checkpoint; None: there are none, as in older runs.

    Of a checkpoint behind an address it holds copies, for as long as this process lives.
    """
    place = checkpoint.parent / KEPT_FOLDER
    return _here(place) if place.is_dir() else None


def kept_tokenizer(cfg: ConfigContainer, checkpoint: Place) -> Path | None:
    """The run's tokenizer among the kept files, in the form of cfg.tokenizer.tokenizer_model; None: it is not there."""
    place, section = kept_folder(checkpoint), cfg.tokenizer
    if place is None or section.tokenizer_model is None:
        return None
    if section.tokenizer_type == "huggingface":
        return place if (place / "tokenizer.json").is_file() else None
    found = place / Path(section.tokenizer_model).name
    return found if found.is_file() else None


def tokenizer_of(cfg: ConfigContainer, checkpoint: Place, fingerprint: str | None) -> Tokenizer | None:
    """The tokenizer of a checkpoint: the kept one, or in older runs the one that the config names. None: it has none.

    Args:
        checkpoint: folder of one checkpoint.
        fingerprint: of the manifest.

    Raises:
        CheckpointError: the kept one has been changed.
        DataError: there is none that can be opened.
    """
    kept = kept_tokenizer(cfg, checkpoint)
    if kept is None:
        return configured_tokenizer(cfg)
    found = open_tokenizer(cfg.tokenizer.tokenizer_type, str(kept))
    if fingerprint is not None and found.fingerprint() != fingerprint:
        raise CheckpointError(
            f"{kept}: is another tokenizer ({found.fingerprint()}) than the checkpoint's ({fingerprint}). Restore the "
            "file, or name the tokenizer with --tokenizer."
        )
    return found
