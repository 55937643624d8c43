"""Fill-in-the-middle: some documents are cut into prefix, middle and suffix, and the middle is put last.

With P, S and M the sentinels before prefix, suffix and middle, a document `prefix middle suffix E` becomes

    PSM:  P prefix S suffix M middle E
    SPM:  P S suffix M prefix middle E

before documents are joined to samples, so nothing is truncated or padded. Which documents, the form and the cuts depend
on (seed, data set, document) only: on neither layout nor position nor what was read before.

Source: Bavarian et al. 2022, arXiv 2207.14255 (SPM in its second variant); DeepSeek-V3, arXiv
2412.19437, section 4.1 (PSM, rate 0.1).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from megatron_mtp.config.sections import DatasetConfig
from megatron_mtp.data.randomness import derive_key, uniform
from megatron_mtp.data.tokenizer import Tokenizer
from megatron_mtp.errors import ConfigError, DataError, Problem

NUM_SENTINELS = 3
MAX_PIECES = 64
"""More ids than a cut token ever becomes."""
KNOWN_TOKENS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),  # as DeepSeek-V3's report writes them
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),  # Mistral
)


def find_sentinels(dataset: DatasetConfig, tokenizer: Tokenizer | None) -> tuple[int, int, int]:
    """Ids of the sentinels before prefix, suffix and middle.

    Raises:
        ConfigError: the run has no tokenizer, or it does not know them.
    """
    rate = f"dataset.fim_rate = {dataset.fim_rate:g}"
    if tokenizer is None:
        raise ConfigError(f"{rate}: takes its sentinels from a tokenizer, and the run has none. Set cfg.tokenizer.")
    for names in KNOWN_TOKENS if dataset.fim_tokens is None else (tuple(dataset.fim_tokens),):
        first, second, third = (tokenizer.token_id(name) for name in names)
        if first is not None and second is not None and third is not None:
            if tokenizer.eod in (first, second, third):
                rule = "one of them ends documents (the tokenizer's end-of-document token)"
                raise ConfigError(Problem(fields=("dataset.fim_tokens",), value=list(names), rule=rule))
            return first, second, third
    if dataset.fim_tokens is None:
        raise ConfigError(
            f"{rate}: the tokenizer ({tokenizer.kind}) knows none of the usual sentinels, such as "
            f"{', '.join(KNOWN_TOKENS[1])}. Name three of its tokens in dataset.fim_tokens."
        )
    unknown = [name for name in dataset.fim_tokens if tokenizer.token_id(name) is None]
    rule = f"the tokenizer ({tokenizer.kind}) has no token {' and no '.join(unknown)}"
    remedy = "Name three of its tokens, those before prefix, suffix and middle."
    raise ConfigError(Problem(fields=("dataset.fim_tokens",), value=dataset.fim_tokens, rule=rule, remedy=remedy))


class TokenCutter:
    """Cuts tokens between characters, as a cursor in a text may stand inside a word."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.fingerprint = tokenizer.fingerprint()
        self.text = lru_cache(1 << 18)(self._text)
        self.pieces = lru_cache(1 << 18)(self._pieces)

    def _text(self, token: int) -> str:
        """The characters of a token; one sign for a token that cannot be cut, such as a special one."""
        text = self._tokenizer.decode([token])
        return text if len(text) > 1 and self._ids(text) == (token,) else "\ufffd"

    def _pieces(self, token: int, cuts: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
        """Ids of the parts of a token between cuts, which rise and lie inside it; None: they do not give its text."""
        text = self.text(token)
        ends = (0, *cuts, len(text))
        parts = tuple(self._ids(text[low:high]) for low, high in itertools.pairwise(ends))
        ids = [id_ for part in parts for id_ in part]
        is_whole = all(parts) and len(ids) <= MAX_PIECES and self._tokenizer.decode(ids) == text
        return parts if is_whole else None

    def _ids(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer.encode_batch([text])[0])
        except ValueError:  # a piece of a number is none
            return ()


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring tokens of a rearranged document.

    Args:
        start, length: of these tokens as they are stored; start is -1 for a sentinel.
        ids: what stands in their place: a sentinel, or pieces of the cut token at `start`.
    """

    start: int
    length: int
    ids: tuple[int, ...] | None = None


ReadTokens = Callable[[int, int, int], np.ndarray]
"""(document, offset, length) -> its tokens as stored."""


@dataclass(frozen=True, slots=True)
class FillInTheMiddle:
    """Rearranges documents of one data set.

    Args:
        rate: share of the documents.
        spm_rate: share of these in the form SPM.
        sentinels: ids before prefix, suffix and middle.
        eod: ends a document and stays last.
        name: of the data set and split, for its random numbers.
        cutter: cuts between characters; None: between tokens.
        has_sentinel_loss: sentinels are targets.
    """

    rate: float
    spm_rate: float
    sentinels: tuple[int, int, int]
    eod: int
    seed: int
    name: str
    cutter: TokenCutter | None = None
    has_sentinel_loss: bool = True
    _keys: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._keys.update({part: derive_key(self.seed, self.name, "fim", part) for part in ("which", "form", "a", "b")})

    def chosen(self, documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Whether documents of these stored lengths are rearranged, bool [n]; those of one token are not."""
        return self.drawn(documents) & (np.asarray(lengths) > 1)

    def drawn(self, documents: np.ndarray) -> np.ndarray:
        """Whether documents would be rearranged if they have more than one token, bool [n]."""
        return uniform(documents, self._keys["which"]) < self.rate

    def added(self, documents: np.ndarray, lengths: np.ndarray, read: ReadTokens) -> np.ndarray:
        """Tokens by which documents grow, int64 [n]: three, and one or more for each cut inside a token."""
        found = self.chosen(documents, lengths).astype(np.int64) * NUM_SENTINELS
        if self.cutter is not None:
            for place in np.flatnonzero(found):
                length = int(lengths[place])
                found[place] = sum(part.length for part in self.parts(int(documents[place]), length, read)) - length
        return found

    def cache_parts(self) -> list[int | str]:
        """What the lengths of the rearranged documents depend on, beside the data and the seed."""
        cutter = "token" if self.cutter is None else self.cutter.fingerprint
        return ["fim 1", repr(self.rate), self.eod, cutter]

    def fits(self, documents: np.ndarray, lengths: np.ndarray, present: np.ndarray) -> bool:
        """Whether documents of these stored lengths can have these lengths after they were rearranged."""
        added, chosen = present - lengths, self.chosen(documents, lengths)
        room = 2 * MAX_PIECES if self.cutter is not None else 0
        return bool(((added >= NUM_SENTINELS * chosen) & (added <= (NUM_SENTINELS + room) * chosen)).all())

    def parts(self, document: int, length: int, read: ReadTokens) -> list[Part]:
        """A chosen document in its new order."""
        has_eod = int(read(document, length - 1, 1)[0]) == self.eod
        size = length - has_eod
        prefix, middle, suffix = self._cut(document, size, read)
        before_prefix, before_suffix, before_middle = (Part(-1, 1, (id_,)) for id_ in self.sentinels)
        if self._draw(document, "form") < self.spm_rate:
            order = [before_prefix, before_suffix, *suffix, before_middle, *prefix, *middle]
        else:
            order = [before_prefix, *prefix, before_suffix, *suffix, before_middle, *middle]
        end = [Part(size, 1)] if has_eod else []
        return [part for part in (*order, *end) if part.length]

    def read(
        self, document: int, length: int, offset: int, count: int, read: ReadTokens, read_targets: ReadTokens | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [offset, offset + count) of a rearranged document, int64, and whether each is a target, bool.

        Args:
            read_targets: 0 for a stored token that is no target; None: all are.

        Raises:
            DataError: the stored sequence holds more than one document, which would be mixed.
        """
        tokens, targets = np.empty(count, np.int64), np.ones(count, bool)
        begin = -offset
        for part in self.parts(document, length, read):
            low, high = max(begin, 0), min(begin + part.length, count)
            if low < high:
                place, first = slice(low, high), low - begin
                tokens[place] = self._tokens(document, part, first, high - low, read)
                if part.start < 0:
                    targets[place] = self.has_sentinel_loss
                elif read_targets is not None:
                    one = part.ids is not None
                    start = part.start if one else part.start + first
                    targets[place] = read_targets(document, start, 1 if one else high - low)
            begin += part.length
        if (tokens[: count - (count == begin)] == self.eod).any():
            raise DataError(
                f"sequence {document} holds an end-of-document token before its end: fill-in-the-middle "
                "(dataset.fim_rate) would mix its documents. Prepare the data with one document in each sequence, or "
                "leave this data set out of dataset.fim_prefixes."
            )
        return tokens, targets

    def _tokens(self, document: int, part: Part, first: int, count: int, read: ReadTokens) -> np.ndarray:
        if part.ids is not None:
            return np.array(part.ids[first : first + count], np.int64)
        return read(document, part.start + first, count)

    def _cut(self, document: int, size: int, read: ReadTokens) -> tuple[list[Part], list[Part], list[Part]]:
        """Prefix, middle and suffix: two places are drawn uniformly, and either may be the beginning or the end."""
        (first, inside), (second, then) = sorted(self._place(document, size, name, read) for name in ("a", "b"))
        pieces: dict[tuple[int, int], Part] = {}
        if first == second:
            cuts = tuple(sorted({inside, then} - {0}))
            inside, then = self._put_pieces(pieces, document, first, cuts, (inside, then), read)
        else:
            (inside,) = self._put_pieces(pieces, document, first, (inside,) if inside else (), (inside,), read)
            (then,) = self._put_pieces(pieces, document, second, (then,) if then else (), (then,), read)

        def span(low: tuple[int, int], high: tuple[int, int]) -> list[Part]:
            return list(_span(low, high, pieces))

        start, end = (0, 0), (size, 0)
        return span(start, (first, inside)), span((first, inside), (second, then)), span((second, then), end)

    def _place(self, document: int, size: int, name: str, read: ReadTokens) -> tuple[int, int]:
        """A cut: before character `inside` of a token; 0: before the token."""
        place = self._draw(document, name) * (size + 1)
        token = int(place)
        if self.cutter is None or token == size:
            return token, 0
        text = self.cutter.text(int(read(document, token, 1)[0]))
        return token, int((place - token) * len(text))

    def _put_pieces(
        self,
        pieces: dict[tuple[int, int], Part],
        document: int,
        token: int,
        cuts: tuple[int, ...],
        wanted: tuple[int, ...],
        read: ReadTokens,
    ) -> tuple[int, ...]:
        """Adds the pieces of a cut token, by (token, first character). Returns the cuts: 0 where it cannot be cut."""
        if not cuts or self.cutter is None:
            return wanted
        found = self.cutter.pieces(int(read(document, token, 1)[0]), cuts)
        if found is None:
            return (0,) * len(wanted)
        for begin, ids in zip((0, *cuts), found, strict=True):
            pieces[token, begin] = Part(token, len(ids), ids)
        return wanted

    def _draw(self, document: int, name: str) -> float:
        return float(uniform(np.array([document]), self._keys[name])[0])


def _span(low: tuple[int, int], high: tuple[int, int], pieces: dict[tuple[int, int], Part]) -> Iterator[Part]:
    """The parts from one cut to another, each a token and a character in it."""
    (token, _), (last, _) = low, high
    whole = token
    for place in sorted(place for place in pieces if low <= place < high):
        yield Part(whole, place[0] - whole) if place[0] > whole else Part(place[0], 0)
        yield pieces[place]
        whole = place[0] + 1
    yield Part(whole, max(0, last - whole))
