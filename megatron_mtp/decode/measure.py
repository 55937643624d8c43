"""Acceptance on a given text, counted as in training evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_mtp.decode.choice import conditional_acceptance
from megatron_mtp.decode.model import Decoder
from megatron_mtp.decode.span import Span

LOGITS_SLOTS = 512
"""Slots whose logits are computed at a time."""


@dataclass(slots=True)
class TextCounts:
    """Slots where depths 1..k-1 agree with the main prediction (`reached`) and depth k does too (`agreed`), by k."""

    reached: list[int] = field(default_factory=list)
    agreed: list[int] = field(default_factory=list)

    def add(self, other: TextCounts) -> None:
        """Adds the counts of another text."""
        if not self.reached:
            self.reached, self.agreed = [0] * len(other.reached), [0] * len(other.agreed)
        self.reached = [a + b for a, b in zip(self.reached, other.reached, strict=True)]
        self.agreed = [a + b for a, b in zip(self.agreed, other.agreed, strict=True)]

    @property
    def acceptance(self) -> list[float]:
        """Conditional acceptance of each depth; NaN if a depth was never reached."""
        return conditional_acceptance(self.reached, self.agreed)


@torch.inference_mode()
def acceptance_on_text(decoder: Decoder, tokens: Sequence[int], num_depths: int) -> TextCounts:
    """Teacher-forced acceptance: the context of every slot is the text, even after a wrong draft.

    The same counts as `chain_valid` and `chain_hits` of objective/acceptance.py on one document.

    Args:
        tokens: at least num_depths + 2 ids; every token with a next one is a slot.
        num_depths: depths beyond D use the last layer again.

    Example:
        With main top-1 [5, 6, 7, 8] and depth-1 top-1 [6, 0, 8, 0] on five tokens, depth 1 has a target at slots 0 to 2
        and agrees at 0 and 2: reached 3, agreed 2.
    """
    text = torch.tensor([list(tokens)], device=decoder.device)
    slots = text.shape[1] - 1
    padded = torch.nn.functional.pad(text, (0, num_depths))
    masks, cis = decoder.positions(slots)
    trunk_caches, depth_caches = decoder.new_caches(1, slots, num_depths)
    span = Span([0], slots, masks, cis)
    normed, source = decoder.trunk(text[:, :slots], span, trunk_caches)
    main, hidden = _top1(decoder, normed), source
    chain = torch.ones(slots, dtype=torch.bool, device=decoder.device)
    counts = TextCounts()
    for k in range(1, num_depths + 1):
        shifted = padded[:, k : k + slots]
        hidden = decoder.depth(k, source if decoder.is_parallel else hidden, shifted, span, depth_caches[k - 1])
        agrees = torch.zeros_like(chain)
        agrees[: slots - k] = _top1(decoder, hidden)[: slots - k] == main[k:]
        chain[slots - k :] = False  # no target
        counts.reached.append(int(chain.sum()))
        chain = chain & agrees
        counts.agreed.append(int(chain.sum()))
    return counts


def _top1(decoder: Decoder, hidden: Tensor) -> Tensor:
    return torch.cat([decoder.logits(part).argmax(dim=-1) for part in hidden.split(LOGITS_SLOTS)])
