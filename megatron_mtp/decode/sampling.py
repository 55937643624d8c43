"""The target distribution of a token, and the rules that accept drafts without changing it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mtp.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen from logits.

    Args:
        temperature: 0: the most probable token (greedy).
        top_k: only the k most probable tokens; 0: all.
        top_p: only the most probable tokens that together reach this probability; 1: all. Applied after top_k.
        seed: seed of the random numbers.

    Raises:
        ConfigError: names every value that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(f"temperature = {self.temperature}: must be 0 (greedy) or a positive number.")
        if self.top_k < 0:
            problems.append(f"top_k = {self.top_k}: must be 0 (all tokens) or a number of tokens.")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p = {self.top_p}: must be above 0 and at most 1 (all tokens).")
        if problems:
            raise ConfigError(problems)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., v] logits -> [..., v] fp32 probabilities that sum to 1."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        probabilities = torch.softmax(logits, dim=-1)
        if self.top_p < 1.0:
            ordered, ids = probabilities.sort(dim=-1, descending=True)
            # A token stays if those before it do not reach top_p; the first one always stays.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, ids, ordered)
            probabilities /= probabilities.sum(-1, keepdim=True)
        return probabilities

    def generator(self, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.seed)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """[n, v] -> [n] ids."""
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def accept_greedy(drafts: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Accepts drafts as long as they are the tokens of greedy decoding.

    Args:
        drafts: [b, K] ids.
        best: [b, K+1], the main model's most probable token at the position of each draft and after the last.

    Returns:
        Number of accepted drafts of each row [b], and the token that follows them [b].

    Example:
        drafts [5, 6, 7] and best [5, 6, 8, 9]: two are accepted, then follows 8.
    """
    accepted = (drafts == best[:, :-1]).to(torch.int64).cumprod(dim=1).sum(dim=1)
    return accepted, best.gather(1, accepted[:, None]).squeeze(1)


def accept_sampled(
    drafts: Tensor, proposed: Tensor, target: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Speculative sampling: the resulting tokens follow `target` exactly, whatever `proposed` is.

    A draft d drawn from q is accepted with probability min(1, p(d) / q(d)). After the first rejection the next token is
    drawn from max(p - q, 0), normalised; if all are accepted, from p. Source: Leviathan et al. 2023, arXiv 2211.17192,
    algorithm 1 and appendix A.1; Chen et al. 2023, arXiv 2302.01318.

    Args:
        drafts: [b, K] ids, draft k drawn from proposed[:, k].
        proposed: [b, K, v], q.
        target: [b, K+1, v], p.

    Returns:
        As `accept_greedy`.
    """
    chosen = drafts[..., None]
    ratio = (target[:, :-1].gather(2, chosen) / proposed.gather(2, chosen)).squeeze(2)
    is_kept = torch.rand(ratio.shape, generator=generator, device=ratio.device) < ratio
    accepted = is_kept.to(torch.int64).cumprod(dim=1).sum(dim=1)
    rows = torch.arange(len(drafts), device=drafts.device)
    none = torch.zeros_like(target[:, :1])
    rest = (target - torch.cat((proposed, none), dim=1))[rows, accepted].clamp_(min=0.0)
    # If p and q differ by rounding only, nothing is left although a draft was rejected.
    empty = rest.sum(-1, keepdim=True) <= 0.0
    rest = torch.where(empty, target[rows, accepted], rest)
    return accepted, draw(rest, generator)
