"""How to decode, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mtp.decode.sampling import Sampling

MAX_AUTO_DRAFTS = 6
"""Most drafts per round that `num_draft = "auto"` tries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to decode.

    Args:
        max_new_tokens: tokens after each prompt.
        num_draft: K, drafts per round; 0: plain decoding; "auto": chosen from measured acceptance and costs.
        widths: a draft tree: number of candidates at depth 1, of children of each at depth 2, and so on; greedy
            decoding of one row only. None: one chain of drafts.
        sampling: greedy by default.
        stop_ids: a row ends with the first of these, which is kept.
        context: most tokens of prompt and answer together; None: model.seq_length.
        with_margins: measure the distance in logits to the second most probable token (costs a little).
    """

    max_new_tokens: int = 64
    num_draft: int | str = 0
    widths: tuple[int, ...] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    context: int | None = None
    with_margins: bool = False
