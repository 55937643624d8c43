"""How to decode, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_mtp.decode.sampling import Sampling

MAX_AUTO_DRAFTS = 6
"""Most drafts per round that `num_draft = "auto"` tries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to decode.

    Args:
        max_new_tokens: tokens after each prompt.
        shorten: where the context has no room for max_new_tokens, give a row fewer instead of refusing.
        num_draft: K, drafts per round; 0: plain decoding; "auto": chosen from measured acceptance and costs.
        widths: a draft tree: number of candidates at depth 1, of children of each at depth 2, and so on; greedy
            decoding of one row only. None: one chain of drafts.
        sampling: greedy by default.
        stop_ids: a row ends with the first of these, which is kept.
        is_end: called with a row's new tokens after each of them; True ends the row. Equal on all ranks.
        context: most tokens of prompt and answer together; None: model.seq_length.
        with_margins: measure the distance in logits to the second most probable token (costs a little).
    """

    max_new_tokens: int = 64
    shorten: bool = False
    num_draft: int | str = 0
    widths: tuple[int, ...] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    is_end: Callable[[list[int]], bool] | None = None
    context: int | None = None
    with_margins: bool = False

    def new_tokens(self, num_prompt_tokens: int, seq_length: int) -> int:
        """Most new tokens of one row; below 1 if the prompt fills the context."""
        room = (self.context or seq_length) - num_prompt_tokens
        return min(self.max_new_tokens, room) if self.shorten else self.max_new_tokens
