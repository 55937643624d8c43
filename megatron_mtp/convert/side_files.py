"""The other files of a Hugging Face folder: config, tokenizer, generation settings. Needs no torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_mtp.checkpoint.kept_files import (
    GENERATION_NAME,
    HF_CONFIG_NAME,
    copy_files,
    kept_folder,
    kept_tokenizer,
    tokenizer_files,
)
from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConversionError
from megatron_mtp.storage.place import Place

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        ConversionError: it is missing or not a JSON object.
    """
    path = folder / HF_CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
        return values
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConversionError(f"{path}: cannot be read ({reason}). Give the folder of a Hugging Face model.") from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes one object, keys in the given order."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_to_export(cfg: ConfigContainer, checkpoint: Place, chosen: Path | None) -> Path | None:
    """Folder or tokenizer.json of the tokenizer to export: the caller's choice, or the run's. None: it has none.

    Args:
        checkpoint: folder of one checkpoint.

    Raises:
        ConversionError: it does not exist, or transformers cannot read it.
    """
    if chosen is None:
        kept = kept_folder(checkpoint)
        chosen = kept_tokenizer(cfg, checkpoint)
        if chosen is None and cfg.tokenizer.tokenizer_model is not None:
            chosen = Path(cfg.tokenizer.tokenizer_model)
        elif chosen is None and kept is not None and tokenizer_files(kept):
            return kept  # of an imported model whose tokenizer cannot be read here
        if chosen is None or cfg.tokenizer.tokenizer_type != "huggingface":
            return None
    if not (chosen / "tokenizer.json" if chosen.is_dir() else chosen).is_file():
        if chosen.is_dir() and tokenizer_files(chosen):
            return chosen
        raise ConversionError(
            f"tokenizer {chosen}: does not exist. Name its tokenizer.json or its folder with --tokenizer, or export "
            "without a tokenizer (--no-tokenizer)."
        )
    return chosen


def write_tokenizer(source: Path, target: Path, eod: tuple[int, str] | None) -> list[str]:
    """Copies a tokenizer. A tokenizer.json alone gets the tokenizer_config.json that transformers needs.

    Args:
        source: folder, or a tokenizer.json.
        eod: id and text of the token that ends a document.
    """
    if source.is_dir():
        names = copy_files(source, target, tokenizer_files(source))
    else:
        shutil.copyfile(source, target / "tokenizer.json")
        names = ["tokenizer.json"]
    if "tokenizer_config.json" not in names and "tokenizer.json" in names:
        values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if eod is not None:
            values["eos_token"] = eod[1]
        write_json(target / "tokenizer_config.json", values)
        names.append("tokenizer_config.json")
    return names


def token_ids(imported: Path | None, eod: tuple[int, str] | None) -> dict[str, Any]:
    """Ids of special tokens for config.json: the imported model's, or the run's end of document.

    Args:
        imported: folder with the config.json that came with an imported model.
        eod: id and text of the token that ends a document.
    """
    if imported is not None:
        values = read_config(imported)
        return {name: values[name] for name in TOKEN_IDS if name in values}
    return {} if eod is None else {"bos_token_id": None, "eos_token_id": eod[0]}


def end_ids(folder: Path) -> set[int]:
    """The ids that end an answer, from generation_config.json, or else config.json, of a Hugging Face folder."""
    for name in (GENERATION_NAME, HF_CONFIG_NAME):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue  # `read_config` refuses a broken config.json
        ids = found if isinstance(found, list) else [found]
        if ids := [id_ for id_ in ids if isinstance(id_, int)]:
            return set(ids)
    return set()
