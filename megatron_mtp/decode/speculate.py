"""The decoding loop: prefill, then draft, verify, accept and commit until all rows are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from megatron_mtp.decode.checks import check_request
from megatron_mtp.decode.choice import DraftLength, conditional_acceptance
from megatron_mtp.decode.model import Decoder
from megatron_mtp.decode.options import Options
from megatron_mtp.decode.sampling import Sampling, accept_greedy, accept_sampled, draw
from megatron_mtp.decode.session import Session
from megatron_mtp.decode.tree import TreeRound, round_tokens

__all__ = ["Counts", "Generation", "OnTokens", "Options", "generate"]

OnTokens = Callable[[int, list[int]], None]
"""Called with a row and its new tokens after every round."""


@dataclass(slots=True)
class Counts:
    """Statistics of drafting. Index k-1 is depth k.

    `proposed` and `accepted` count drafted tokens that were offered and used; if a row ends within a round, only the
    tokens up to its end count as used. `reached` and `agreed` leave such rounds out: depth k is reached if all depths
    before it were accepted, and agreed if it was accepted too, so agreed / reached is the conditional acceptance.
    """

    rounds: int = 0
    """Passes of the main model after the prefill, summed over the rows that were not finished."""
    new_tokens: int = 0
    """Tokens of those passes: all but the first of each row, which is the prefill's."""
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    agreed: list[int] = field(default_factory=list)

    def add(self, count: int, accepted: int, used: int, is_cut: bool) -> None:
        """Adds one row of one round: `count` drafts, of which `accepted` agreed and `used` became part of the text."""
        self.rounds += 1
        for column in (self.proposed, self.accepted, self.reached, self.agreed):
            column.extend([0] * (count - len(column)))
        for k in range(1, count + 1):
            self.proposed[k - 1] += 1
            self.accepted[k - 1] += k <= used
            if not is_cut:
                self.reached[k - 1] += k - 1 <= accepted
                self.agreed[k - 1] += k <= accepted

    def merge(self, other: Counts) -> None:
        """Adds the counts of another run."""
        self.rounds += other.rounds
        self.new_tokens += other.new_tokens
        for name in ("proposed", "accepted", "reached", "agreed"):
            ours, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, [a + b for a, b in zip_longest(ours, theirs, fillvalue=0)])

    @property
    def acceptance(self) -> list[float]:
        """Conditional acceptance of each depth; NaN if a depth was never reached."""
        return conditional_acceptance(self.reached, self.agreed)

    @property
    def tokens_per_pass(self) -> float:
        """new_tokens / rounds: what a pass of the main model after the prefill yields on average."""
        return self.new_tokens / self.rounds if self.rounds else 1.0


@dataclass(slots=True)
class Generation:
    """Result of `generate`.

    Args:
        tokens: new tokens of each row.
        is_ended: whether a row ended by `stop_ids` or `is_end`, and not by its length.
        counts: statistics of all rounds.
        prefill_s, decode_s: seconds up to the first token, and after it.
        draft_s, verify_s: parts of decode_s spent on drafting and in the main model; not measured for a draft tree.
        margin: smallest difference in logits between the best token and the second, over all tokens of greedy decoding.
    """

    tokens: list[list[int]]
    counts: Counts
    is_ended: list[bool] = field(default_factory=list)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    margin: float = float("inf")

    def add(self, other: Generation) -> None:
        """Adds the rows and measurements of another batch."""
        self.tokens += other.tokens
        self.is_ended += other.is_ended
        self.counts.merge(other.counts)
        for name in ("prefill_s", "decode_s", "draft_s", "verify_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.margin = min(self.margin, other.margin)

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of all rows together, without the prefill and its token."""
        return self.counts.new_tokens / self.decode_s if self.decode_s else float("nan")


@torch.inference_mode()
def generate(
    decoder: Decoder, prompts: Sequence[Sequence[int]], options: Options, on_tokens: OnTokens | None = None
) -> Generation:
    """Continues the prompts, all in one batch.

    Drafts never change the result: greedy decoding gives the same tokens as without drafts, and sampling the same
    distribution. In floating point a token can differ only if two logits are closer than rounding; see
    docs/decoding.md.

    Args:
        prompts: token ids, of any lengths.
        on_tokens: called with new tokens after every round.

    Raises:
        ConfigError, DataError, UnsupportedError: the request does not fit the model; raised before any computation.
    """
    num_drafts = check_request(decoder, prompts, options)
    limits = [options.new_tokens(len(ids), decoder.model.seq_length) for ids in prompts]
    rows = Answers(limits, options, on_tokens)
    session = Session(decoder, prompts, max(limits), num_drafts, round_tokens(num_drafts, options.widths))
    chooser = DraftLength(num_drafts, is_fixed=options.num_draft != "auto", tp=decoder.tp)
    generator = options.sampling.generator(decoder.device)
    started = time.perf_counter()
    first = _first_tokens(session.prefill(), rows, generator)
    session.append(first)
    rows.start(first)
    prefilled = time.perf_counter()
    tree = TreeRound(session, options.widths) if options.widths else None
    while not rows.are_done:
        if tree is not None:
            rows.take_tree(tree.run(), tree.depth)
        else:
            _round(session, rows, chooser, generator)
    rows.result.prefill_s, rows.result.decode_s = prefilled - started, time.perf_counter() - prefilled
    rows.result.draft_s, rows.result.verify_s = (chooser.totals.get(part, 0.0) for part in ("draft", "verify"))
    return rows.result


def _first_tokens(logits: Tensor, rows: Answers, generator: torch.Generator) -> list[int]:
    """logits: [b, v] after the prompts -> the first new token of each row."""
    sampling = rows.options.sampling
    if sampling.is_greedy:
        rows.note_margin(logits)
        return logits.argmax(dim=-1).tolist()
    return draw(sampling.probabilities(logits), generator).tolist()


def _round(session: Session, rows: Answers, chooser: DraftLength, generator: torch.Generator) -> None:
    """One round of all b rows with K = `count` drafts each."""
    sampling, count = rows.options.sampling, chooser.next()
    proposed: list[Tensor] = []  # K times [b, v], the distributions that drafts were drawn from
    with chooser.timed("draft", count):
        if count:
            drawn = partial(_pick_drawn, sampling, generator, proposed, session.decoder.vocab_size)
            session.draft(count, _pick_best if sampling.is_greedy else drawn)
    with chooser.timed("verify", count):
        logits = session.verify(count)  # [b, K+1, v]
        drafts = session.drafts(count)  # [b, K]
        if sampling.is_greedy:
            accepted, next_ids = accept_greedy(drafts, logits.argmax(dim=-1))
        else:
            target = sampling.probabilities(logits)  # [b, K+1, v]
            q = torch.stack(proposed, dim=1) if count else target[:, :0]  # [b, K, v]
            accepted, next_ids = accept_sampled(drafts, q, target, generator)
        kept, following, drafted = accepted.tolist(), next_ids.tolist(), drafts.tolist()  # [b], [b], [b][K]
    if sampling.is_greedy:
        rows.note_margin(logits, kept)
    active = rows.active
    session.commit(count, kept, following, active)
    for row in range(session.b):
        if active[row]:
            rows.take(row, [*drafted[row][: kept[row]], following[row]], count)
            chooser.add(count, kept[row])


def _pick_best(logits: Tensor) -> Tensor:
    """[b, v] -> ids [b]."""
    return logits.argmax(dim=-1)


def _pick_drawn(
    sampling: Sampling, generator: torch.Generator, proposed: list[Tensor], vocab_size: int, logits: Tensor
) -> Tensor:
    """logits: [b, drafted ids] -> ids [b], and their distribution [b, v] appended to `proposed`."""
    probabilities = sampling.probabilities(logits)
    # Ids that are never drafted have probability 0.
    proposed.append(torch.nn.functional.pad(probabilities, (0, vocab_size - probabilities.shape[-1])))
    return draw(probabilities, generator)


class Answers:
    """New tokens of each row, and which rows are not finished."""

    def __init__(self, limits: list[int], options: Options, on_tokens: OnTokens | None):
        self.limits, self.options, self.on_tokens = limits, options, on_tokens
        self.active = [True] * len(limits)
        self.result = Generation([[] for _ in limits], Counts(), [False for _ in limits])

    @property
    def are_done(self) -> bool:
        return not any(self.active)

    def start(self, tokens: list[int]) -> None:
        """Adds the first token of each row, from the prefill."""
        for row, token in enumerate(tokens):
            self._extend(row, [token])

    def take(self, row: int, tokens: list[int], count: int) -> None:
        """Adds one row's tokens of a round with `count` drafts: the accepted drafts and the token after them."""
        accepted = len(tokens) - 1
        used = self._extend(row, tokens)
        self.result.counts.add(count, accepted, used - 1, is_cut=not self.active[row])
        self.result.counts.new_tokens += used

    def take_tree(self, tokens: list[int], depth: int) -> None:
        """As `take`, for the only row of a draft tree."""
        self.take(0, tokens, depth)

    def note_margin(self, logits: Tensor, kept: list[int] | None = None) -> None:
        """logits: [b, v], or [b, K+1, v] of which each row uses the first kept + 1."""
        if not self.options.with_margins:
            return
        best = logits.float().topk(2, dim=-1).values
        gaps = best[..., 0] - best[..., 1]
        for row, is_active in enumerate(self.active):
            if is_active:
                part = gaps[row] if kept is None else gaps[row, : kept[row] + 1]
                self.result.margin = min(self.result.margin, float(part.min()))

    def _extend(self, row: int, tokens: list[int]) -> int:
        """Adds tokens up to the row's end. Returns how many."""
        done, is_end = self.result.tokens[row], self.options.is_end
        start = len(done)
        for token in tokens[: self.limits[row] - start]:
            done.append(token)
            if token in self.options.stop_ids or (is_end is not None and is_end(done)):
                self.result.is_ended[row], self.active[row] = True, False
                break
        if len(done) >= self.limits[row]:
            self.active[row] = False
        if self.on_tokens is not None and len(done) > start:
            self.on_tokens(row, done[start:])
        return len(done) - start
