"""What to continue: texts, conversations and token ids, from the command line and from .jsonl files. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mtp.data.tokenizer import Tokenizer
from megatron_mtp.errors import DataError

Request = dict[str, Any]
"""One of "prompt" (a text), "messages" (a conversation) and "ids" (token ids); other keys are the caller's."""
KINDS = ("prompt", "messages", "ids")


def read_requests(path: Path) -> list[Request]:
    """The requests of a .jsonl file, one a line.

    Raises:
        DataError: names the first line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file {path}: cannot be read as text ({error}).") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError as error:
            raise DataError(f"--prompt-file {path}, line {number}: is not JSON ({error}).") from None
        if (problem := _problem(request)) is not None:
            raise DataError(
                f"--prompt-file {path}, line {number}: {problem}. A line is an object with one of prompt (a text), "
                "messages (a list of objects with role and content) and ids (a list of token ids)."
            )
        found.append(request)
    if not found:
        raise DataError(f"--prompt-file {path}: holds no request.")
    return found


def _problem(request: Any) -> str | None:
    kinds = [kind for kind in KINDS if isinstance(request, dict) and kind in request]
    if len(kinds) != 1:
        return f"has {' and '.join(kinds) or 'none'} of {', '.join(KINDS)}"
    value = request[kinds[0]]
    if kinds[0] == "prompt":
        fits = isinstance(value, str)
    elif kinds[0] == "ids":
        fits = isinstance(value, list) and all(type(id_) is int for id_ in value)
    else:
        fits = isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
    return None if fits else f"{kinds[0]} = {value!r} has another form"


def shown(request: Request) -> str:
    """A request as text."""
    if "prompt" in request:
        return request["prompt"]
    if "ids" in request:
        return " ".join(map(str, request["ids"]))
    return "".join(f"{message['role']}: {message.get('content')}\n" for message in request["messages"])


class StopText:
    """Ends a row at the first of some strings. Called with a row's new tokens after each of them.

    Args:
        decode: tokens -> text.
        strings: not empty.
    """

    def __init__(self, decode: Callable[[list[int]], str], strings: list[str]):
        self.decode, self.strings = decode, strings
        # A token has at least a byte; a few more tokens, since a decoder may drop a space at the very beginning.
        self._window = max(len(string.encode()) for string in strings) + 8

    def __call__(self, tokens: list[int]) -> bool:
        tail = self.decode(tokens[-self._window :])
        return any(string in tail for string in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first of the strings."""
        return text[: min((place for s in self.strings if (place := text.find(s)) >= 0), default=len(text))]

    @property
    def held_back(self) -> int:
        """Characters at the end of an unfinished text that may turn out to belong to one of the strings."""
        return max(map(len, self.strings)) - 1


def answer_text(tokenizer: Tokenizer, tokens: list[int], end_ids: frozenset[int], stop: StopText | None) -> str:
    """Text of new tokens, without the end token and without the stop string."""
    kept = tokens[:-1] if tokens and tokens[-1] in end_ids else tokens
    text = tokenizer.decode(kept)
    return text if stop is None else stop.cut(text)
