"""How much of each corpus a run, or one evaluation, reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mtp.data.blend import BlendedSource
from megatron_mtp.data.source import SampleSource


@dataclass(frozen=True, slots=True)
class CorpusUse:
    """What is drawn from one prefix.

    Args:
        num_documents, num_tokens, num_samples: of its split.
        share: of the draws, while no corpus has used up its budget (dataset.budgets).
        epochs: how often each sample is drawn on average; None: the run has no length in samples.
    """

    prefix: str
    num_documents: int
    num_tokens: int
    num_samples: int
    share: float
    epochs: float | None


def corpus_uses(source: SampleSource, num_draws: int | None) -> list[CorpusUse]:
    """What `num_draws` draws take from each corpus of a source; empty for mock data."""
    if not isinstance(source, BlendedSource):
        return []
    drawn = [None] * len(source.corpora) if num_draws is None else source.expected_draws(num_draws)
    return [
        CorpusUse(
            prefix=corpus.reader.prefix,
            num_documents=corpus.documents[1] - corpus.documents[0],
            num_tokens=corpus.num_tokens,
            num_samples=corpus.num_samples,
            share=share,
            epochs=None if draws is None else draws / corpus.num_samples,
        )
        for corpus, share, draws in zip(source.corpora, source.shares, drawn, strict=True)
    ]


def repeats(name: str, uses: Sequence[CorpusUse]) -> str | None:
    """A sentence on a validation set that one evaluation reads more than once; None: it does not.

    Example: "validation set docs: 96 samples, one evaluation reads it 2.7 times".
    """
    if not uses:
        return None
    most = max(uses, key=lambda use: use.epochs or 0.0)
    if most.epochs is None or most.epochs <= 1:
        return None
    what = "it" if len(uses) == 1 else most.prefix
    samples = sum(use.num_samples for use in uses)
    return f"validation set {name}: {samples:,} samples, one evaluation reads {what} {most.epochs:.1f} times"
