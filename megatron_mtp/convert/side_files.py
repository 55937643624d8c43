"""The other files of a Hugging Face folder: config, tokenizer, generation settings. Needs no torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import ConversionError

CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"
TOKENIZER_NAMES = tuple(
    """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt
    tokenizer.model tiktoken.model chat_template.jinja""".split()
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
KEPT_FOLDER = "hf"
"""Folder next to an imported checkpoint with the files that came with it."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        ConversionError: it is missing or not a JSON object.
    """
    path = folder / CONFIG_NAME
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


def keep(source: Path, target: Path) -> list[str]:
    """Copies config, tokenizer and generation settings that a folder has; returns their names."""
    names = [name for name in (CONFIG_NAME, GENERATION_NAME, *TOKENIZER_NAMES) if (source / name).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def tokenizer_folder(cfg: ConfigContainer, chosen: Path | None) -> Path | None:
    """Path of the tokenizer to export: the caller's choice, or the run's.

    Raises:
        ConversionError: it does not exist, or transformers cannot read it.
    """
    if chosen is None and cfg.tokenizer.tokenizer_type == "huggingface" and cfg.tokenizer.tokenizer_model:
        chosen = Path(cfg.tokenizer.tokenizer_model)
    if chosen is None:
        return None
    found = chosen / "tokenizer.json" if chosen.is_dir() else chosen
    if not found.is_file():
        others = [name for name in TOKENIZER_NAMES if chosen.is_dir() and (chosen / name).is_file()]
        if others:
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
        names = [name for name in TOKENIZER_NAMES if (source / name).is_file()]
        for name in names:
            shutil.copyfile(source / name, target / name)
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


def token_ids(kept: Path | None, eod: tuple[int, str] | None) -> dict[str, Any]:
    """Ids of special tokens for config.json: the imported model's, or the run's end of document.

    Args:
        kept: folder of the files that came with an imported model.
        eod: id and text of the token that ends a document.
    """
    if kept is not None and (kept / CONFIG_NAME).is_file():
        imported = read_config(kept)
        return {name: imported[name] for name in TOKEN_IDS if name in imported}
    return {} if eod is None else {"bos_token_id": None, "eos_token_id": eod[0]}
