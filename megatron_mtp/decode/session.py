"""Texts that are being decoded: their tokens, their caches, and how many slots of each cache are valid.

With L known tokens t[0] .. t[L-1] in a row, the trunk has seen slots 0 .. L-2. Depth k at slot i reads t[i+k] and
predicts t[i+k+1], so depth k at slot L-2 drafts t[L-1+k]:

    depth 1 at slot L-2 reads t[L-1] and drafts d1;  depth 2 at slot L-2 reads d1 and drafts d2;  ...
    the trunk runs t[L-1], d1 .. dK at slots L-1 .. L-1+K and predicts what follows each of them

A slot of depth k that read a draft is valid if the draft was accepted. `filled` counts, for each depth and row, the
leading valid slots; the next drafting runs every depth from the smallest count on, at most K slots back. Depths beyond
D use the last layer again, each with its own cache: in training, too, the k-th use of a layer sees only k-th outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_mtp.decode.model import Decoder
from megatron_mtp.decode.span import Span

Pick = Callable[[Tensor], Tensor]
"""Logits [b, v] of a depth -> drafted ids [b]."""


class Session:
    """Rows that are decoded together.

    Args:
        prompts: ids of each row, at least one each.
        max_new_tokens: most tokens that follow a prompt.
        num_drafts: most drafted depths per round; 0: no MTP layer runs.
        round_tokens: most drafts per round, which a tree has more of; None: num_drafts.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        num_drafts: int,
        round_tokens: int | None = None,
    ):
        self.decoder, self.num_drafts, self.b = decoder, num_drafts, len(prompts)
        self.lengths = [len(prompt) for prompt in prompts]
        self.capacity = slots_needed(max(self.lengths), max_new_tokens, round_tokens or num_drafts)
        device = decoder.device
        self.tokens = torch.zeros(self.b, self.capacity + num_drafts, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
        self.masks, self.cis = decoder.positions(self.capacity)
        self.trunk_caches, self.depth_caches = decoder.new_caches(self.b, self.capacity, num_drafts)
        self.filled = [[0] * self.b for _ in range(num_drafts)]
        # [b, slots, h]: what depth 1 reads, for every slot that the trunk has seen.
        self.sources = torch.zeros(
            self.b, self.capacity if num_drafts else 0, decoder.model.hidden_size, dtype=decoder.dtype, device=device
        )

    def prefill(self) -> Tensor:
        """Runs the trunk over the prompts. Returns logits [b, v] of the next tokens."""
        q = max(self.lengths)
        hidden = self._trunk([0] * self.b, q)
        last = torch.tensor(self.lengths, device=hidden.device) - 1
        return self.decoder.logits(hidden[torch.arange(self.b, device=hidden.device), last])

    def append(self, next_tokens: list[int]) -> None:
        """Appends the first new token of each row."""
        for row, token in enumerate(next_tokens):
            self.tokens[row, self.lengths[row]] = token
            self.lengths[row] += 1

    def draft(self, count: int, pick: Pick) -> None:
        """Drafts `count` tokens for each row and stores them after its tokens.

        Args:
            pick: called for each depth in order.
        """
        wanted = [min(filled[row] for filled in self.filled[:count]) for row in range(self.b)]
        q = max(length - 1 - start for length, start in zip(self.lengths, wanted, strict=True))
        # Rows that need fewer slots repeat some; a row shorter than q also runs slots after its last token.
        starts = [max(0, length - 1 - q) for length in self.lengths]
        span = Span(starts, q, self.masks, self.cis)
        source = hidden = self._window(self.sources, span).flatten(0, 1)
        for k in range(1, count + 1):
            tokens = self._window(self.tokens, span, ahead=k)
            hidden = self.decoder.depth(
                k, source if self.decoder.is_parallel else hidden, tokens, span, self.depth_caches[k - 1]
            )
            self._put_drafts(k, pick(self.decoder.draft_logits(self._last(hidden, span))))

    def drafts(self, count: int) -> Tensor:
        """[b, count] ids drafted last."""
        return self._ahead(1, count)

    def verify(self, count: int) -> Tensor:
        """Runs the trunk over each row's last token and drafts. Returns logits [b, count + 1, v] after each."""
        hidden = self._trunk([length - 1 for length in self.lengths], count + 1)
        return self.decoder.logits(hidden.flatten(0, 1)).view(self.b, count + 1, -1)

    def commit(self, count: int, accepted: list[int], next_tokens: list[int], active: list[bool] | None = None) -> None:
        """Keeps the accepted drafts and the token after them, and rolls all caches back to there.

        Args:
            count: drafts in this round.
            accepted: number of accepted drafts of each row.
            next_tokens: the token after them, of each row.
            active: rows that advance; the others stay. None: all.
        """
        for row in range(self.b):
            length, kept = self.lengths[row], accepted[row]
            is_active = active is None or active[row]
            for k in range(1, count + 1):
                right = (
                    length - 1 if self.decoder.is_parallel else min(length - 1, length - k + (kept if is_active else 0))
                )
                self.filled[k - 1][row] = right
            if is_active:
                self.tokens[row, length + kept] = next_tokens[row]
                self.lengths[row] = length + kept + 1

    def _trunk(self, starts: list[int], q: int) -> Tensor:
        span = Span(starts, q, self.masks, self.cis)
        hidden, source = self.decoder.trunk(self._window(self.tokens, span), span, self.trunk_caches)
        if self.num_drafts:
            if span.start is not None:
                self.sources[:, span.start : span.stop] = source.view(self.b, q, -1)
            else:
                self.sources[span.rows, span.positions] = source.view(self.b, q, -1)
        return hidden.view(self.b, q, -1)

    def _window(self, rows: Tensor, span: Span, ahead: int = 0) -> Tensor:
        """[b, q, ...]: `rows` [b, slots, ...] at the slots of `span`, shifted by `ahead`."""
        if span.start is not None:
            return rows[:, span.start + ahead : span.stop + ahead]
        return rows[span.rows, span.positions + ahead]

    def _last(self, hidden: Tensor, span: Span) -> Tensor:
        """[b * q, h] -> [b, h] at slot L-2 of each row."""
        hidden = hidden.view(self.b, span.q, -1)
        index = [length - 2 - start for length, start in zip(self.lengths, span.starts, strict=True)]
        if all(i == span.q - 1 for i in index):
            return hidden[:, -1]
        return hidden[torch.arange(self.b, device=hidden.device), torch.tensor(index, device=hidden.device)]

    def _put_drafts(self, k: int, ids: Tensor) -> None:
        if self.b == 1:
            self.tokens[:, self.lengths[0] - 1 + k] = ids
        else:
            at = torch.tensor(self.lengths, device=ids.device) - 1 + k
            self.tokens[torch.arange(self.b, device=ids.device), at] = ids

    def _ahead(self, first: int, count: int) -> Tensor:
        if self.b == 1:
            start = self.lengths[0] - 1 + first
            return self.tokens[:, start : start + count]
        at = torch.tensor(self.lengths, device=self.tokens.device)[:, None] - 1 + first
        return self.tokens.gather(1, at + torch.arange(count, device=at.device))


def slots_needed(prompt: int, max_new_tokens: int, round_tokens: int) -> int:
    """Slots of a row's caches. Its last round can exceed its end by all drafts, and so can rounds of other rows."""
    return prompt + max_new_tokens + 2 * round_tokens
