"""Tokenizers with one small interface: Hugging Face, SentencePiece, tiktoken, bytes, and none.

Each library is imported when its tokenizer is opened.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, cast

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.derive import BYTES_VOCAB_SIZE
from megatron_mtp.data.files import stat_file
from megatron_mtp.errors import ConfigError, DataError, Problem

# Names of the end-of-document token, in the order in which they are tried if no config file names it.
_EOD_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
)

# Splitting pattern of Megatron-Core's tiktoken tokenizer ("v2"), used because the files hold no pattern.
_TIKTOKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MAX_VOCAB_SIZE = 2**31  # data files hold int32


class Tokenizer(Protocol):
    """Text <-> ids.

    Attributes:
        kind: tokenizer.tokenizer_type.
        vocab_size: every id is below it.
        eod: id that ends a document.
    """

    kind: str
    vocab_size: int
    eod: int

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; nothing is added before or after.

        Raises:
            ValueError: a text has no ids.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become replacement characters."""
        ...

    def token_id(self, name: str) -> int | None:
        """The id of a token by its name in the vocabulary, such as `<|endoftext|>`; None: there is none."""
        ...

    def fingerprint(self) -> str:
        """A hash of the tokenizer's contents; equal for equal tokenizers, wherever their files are."""
        ...


class HuggingFaceTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` library.

    The name of a special token inside a text is encoded as text, so no document can end another one early. In a prompt
    it is that token (`encode_prompt`).

    Attributes:
        settings: content of the tokenizer_config.json beside the file; empty without one.
        special: "bos_token" and the like -> text of the token.
        path: the file.
    """

    kind = "huggingface"

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Fast

        file = path / "tokenizer.json" if path.is_dir() else path
        content = _read(file)
        try:
            self._fast = Fast.from_str(content.decode())
            self._fast.encode_special_tokens = True
            self._fast.no_truncation()
            self._content = json.dumps(json.loads(content), sort_keys=True)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer {file}: is not a Hugging Face tokenizer.json ({error}).") from error
        vocab = self._fast.get_vocab(with_added_tokens=True)
        if not vocab:
            raise DataError(f"tokenizer {file}: has no tokens.")
        self.path = file
        self.settings = _settings(file.parent / "tokenizer_config.json")
        # As in transformers, the older file counts only if the newer one does not list the tokens.
        older = {} if "added_tokens_decoder" in self.settings else _settings(file.parent / "special_tokens_map.json")
        self.special = {name: text for name, value in (self.settings | older).items() if (text := _token(name, value))}
        self.vocab_size = max(vocab.values()) + 1
        self.eod = self._find_eod(vocab)

    def _find_eod(self, vocab: dict[str, int]) -> int:
        file = self.path
        for name in (self.special.get("eos_token", ""), *_EOD_NAMES):
            if name in vocab:
                return vocab[name]
        raise DataError(
            f"tokenizer {file}: has no end-of-document token. Name it as eos_token in a tokenizer_config.json next to "
            f"the file, or add one of {', '.join(_EOD_NAMES)} to the tokenizer."
        )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises bare Exception
            raise ValueError(str(error)) from error

    def encode_prompt(self, text: str, *, is_rendered: bool = False) -> list[int]:
        """Ids of a prompt, equal to those of transformers 5.

        Args:
            is_rendered: the text comes from a chat template, which has written all special tokens. Otherwise tokens are
                added that the file's post-processor adds, such as BOS.
        """
        return list(self._for_prompts.encode(text, add_special_tokens=not is_rendered).ids)

    @cached_property
    def _for_prompts(self) -> Any:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Fast

        fast = Fast.from_str(self._content)
        fast.no_truncation()
        fast.no_padding()
        listed = self.settings.get("added_tokens_decoder", {})
        fast.add_tokens([AddedToken(**_flags(listed[id_])) for id_ in sorted(listed, key=int)])
        extra = self.settings.get("extra_special_tokens") or self.settings.get("additional_special_tokens") or []
        names = [*self.special.values(), *(extra if isinstance(extra, list) else extra.values())]
        fast.add_special_tokens([name for name in names if isinstance(name, str)])
        return fast

    def decode(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=False)

    def token_id(self, name: str) -> int | None:
        found: int | None = self._fast.token_to_id(name)
        return found

    def fingerprint(self) -> str:
        return _hash(self.kind, self._content.encode())


class SentencePieceTokenizer:
    """A SentencePiece `*.model`."""

    kind = "sentencepiece"

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        self._content = _read(path)
        try:
            self._processor = SentencePieceProcessor(model_proto=self._content)
        except RuntimeError as error:
            raise DataError(f"tokenizer {path}: is not a SentencePiece model ({error}).") from error
        self.vocab_size = self._processor.vocab_size()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise DataError(f"tokenizer {path}: has no end-of-sentence piece, which is needed to end documents.")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return cast(list[list[int]], self._processor.encode(texts))

    def decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))

    def token_id(self, name: str) -> int | None:
        found = int(self._processor.piece_to_id(name))
        return found if self._processor.id_to_piece(found) == name else None  # an unknown name gets the unknown id

    def fingerprint(self) -> str:
        return _hash(self.kind, self._content)


class TiktokenTokenizer:
    """A `*.tiktoken` file (base64 token and rank on each line), or a JSON list of {rank, token_bytes}.

    The files hold neither a pattern nor special tokens: the pattern is Megatron-Core's, and `<|endoftext|>` gets the
    first free id.
    """

    kind = "tiktoken"

    def __init__(self, path: Path):
        import tiktoken

        content = _read(path)
        try:
            if path.suffix == ".json":
                ranks = {base64.b64decode(item["token_bytes"]): int(item["rank"]) for item in json.loads(content)}
            else:
                pairs = (line.split() for line in content.splitlines() if line)
                ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            self.eod = max(ranks.values()) + 1
            self._encoding = tiktoken.Encoding(
                path.stem, pat_str=_TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": self.eod}
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise DataError(f"tokenizer {path}: is not a tiktoken file ({error}).") from error
        self._ranks, self._known = ranks, {*ranks.values(), self.eod}
        self.vocab_size = self.eod + 1

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts)

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode([id_ for id_ in ids if id_ in self._known])  # a file may leave ids out

    def token_id(self, name: str) -> int | None:
        return self.eod if name == "<|endoftext|>" else self._ranks.get(name.encode())

    def fingerprint(self) -> str:
        ranks = sorted((rank, token.hex()) for token, rank in self._ranks.items())
        return _hash(self.kind, json.dumps(ranks).encode())


class BytesTokenizer:
    """UTF-8 bytes as ids 0..255, with 256 as end of document."""

    kind, vocab_size, eod = "bytes", BYTES_VOCAB_SIZE, BYTES_VOCAB_SIZE - 1

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8", errors="surrogatepass")) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(id_ for id_ in ids if id_ < 256).decode("utf-8", errors="replace")

    def token_id(self, name: str) -> int | None:
        return ord(name) if len(name) == 1 and ord(name) < 128 else None

    def fingerprint(self) -> str:
        return _hash(self.kind, b"")


class NullTokenizer:
    """For text that consists of ids separated by spaces; the last id of the vocabulary ends a document."""

    kind = "null"

    def __init__(self, vocab_size: int):
        self.vocab_size, self.eod = vocab_size, vocab_size - 1

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encoded = [[int(word) for word in text.split()] for text in texts]
        for id_ in chain.from_iterable(encoded):
            if not 0 <= id_ < self.vocab_size:
                raise ValueError(f"id {id_} is outside the vocabulary of {self.vocab_size}")
        return encoded

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def token_id(self, name: str) -> int | None:
        return int(name) if name.isdecimal() and len(name) < 11 and int(name) < self.vocab_size else None

    def fingerprint(self) -> str:
        return _hash(self.kind, str(self.vocab_size).encode())


_FILE_KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "huggingface": HuggingFaceTokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "tiktoken": TiktokenTokenizer,
}


def open_tokenizer(kind: str, model: str | None = None, vocab_size: int | None = None) -> Tokenizer:
    """Opens a tokenizer by the fields of cfg.tokenizer.

    Raises:
        ConfigError: a required field of this kind is missing.
        DataError: the file is missing or is not a tokenizer of this kind.
    """
    if kind == "bytes":
        return BytesTokenizer()
    if kind == "null":
        if not vocab_size or not 2 <= vocab_size <= MAX_VOCAB_SIZE:
            rule = f"tokenizer_type 'null' needs the number of ids, from 2 to {MAX_VOCAB_SIZE:,}"
            raise ConfigError(Problem(fields=("tokenizer.vocab_size",), value=vocab_size, rule=rule))
        return NullTokenizer(vocab_size)
    if model is None:
        raise ConfigError(f"tokenizer.tokenizer_model = None: tokenizer_type '{kind}' needs a file.")
    tokenizer = _FILE_KINDS[kind](Path(model))
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise DataError(f"tokenizer {model}: has the id {tokenizer.vocab_size - 1}, but data files hold int32.")
    return tokenizer


def tokenizer_from_spec(spec: str) -> Tokenizer:
    """Opens a tokenizer by its name: "bytes", "null:VOCAB", or a path whose ending shows its kind.

    `*.model` is SentencePiece, `*.tiktoken` is tiktoken, and a folder or any other `*.json` is Hugging Face. Where the
    ending is misleading, write the kind before the path, as in "tiktoken:PATH".
    """
    kind, _, rest = spec.partition(":")
    if kind == "null":
        if not rest.isdecimal() or len(rest) > 20:
            raise ConfigError(f"tokenizer {spec!r}: write null:VOCAB with the number of ids, such as null:32000.")
        return open_tokenizer("null", vocab_size=int(rest))
    if spec == "bytes":
        return open_tokenizer("bytes")
    if kind in _FILE_KINDS and rest:
        return open_tokenizer(kind, rest)
    by_ending = {".model": "sentencepiece", ".tiktoken": "tiktoken"}
    return open_tokenizer(by_ending.get(Path(spec).suffix, "huggingface"), spec)


def configured_tokenizer(cfg: ConfigContainer) -> Tokenizer | None:
    """The tokenizer of the run; None if cfg.tokenizer names none (type null without a vocabulary)."""
    section = cfg.tokenizer
    if section.tokenizer_type == "null" and section.vocab_size is None:
        return None
    return open_tokenizer(section.tokenizer_type, section.tokenizer_model, section.vocab_size)


def resolve_vocab_size(cfg: ConfigContainer) -> int:
    """model.vocab_size, or the tokenizer's if that is None. Needs no torch.

    Raises:
        ConfigError: neither is set.
    """
    if cfg.model.vocab_size is not None:
        return cfg.model.vocab_size
    tokenizer = configured_tokenizer(cfg)
    if tokenizer is None:
        raise ConfigError(
            "model.vocab_size = None: no tokenizer defines the size of the vocabulary. Set model.vocab_size, "
            "tokenizer.vocab_size, or a tokenizer."
        )
    return tokenizer.vocab_size


def end_of_document(tokenizer: Tokenizer | None, vocab_size: int) -> int:
    """The end-of-document id: the tokenizer's, or the last id of the vocabulary without a tokenizer."""
    return vocab_size - 1 if tokenizer is None else tokenizer.eod


def _settings(path: Path) -> dict[str, Any]:
    """Content of a JSON file beside a tokenizer; empty if there is none.

    Raises:
        DataError: it holds no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(_read(path)).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"tokenizer {path}: is not a {path.name} ({error}).") from error


def _flags(token: dict[str, Any]) -> dict[str, Any]:
    """The arguments of AddedToken in an entry of added_tokens_decoder."""
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: value for name, value in token.items() if name in known}


def _token(name: str, value: Any) -> str | None:
    """Text of an entry such as "bos_token" of tokenizer_config.json; None: it is another kind of entry."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if name.endswith("_token") and isinstance(text, str) else None


def _read(path: Path) -> bytes:
    try:
        stat_file(path)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {path}: cannot be read ({error.strerror}).") from error


def _hash(kind: str, content: bytes) -> str:
    return f"{kind}-{hashlib.sha256(content).hexdigest()[:32]}"
