"""The endless sequence of samples that a run reads: the interface of every data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of s+1 tokens.

    Attributes:
        tokens: int64 [s+1].
        starts: bool [s+1], true where a token begins a document.
        is_target: bool [s+1], false where a token has no loss at any depth, such as a prompt's; None: all are targets.
    """

    tokens: np.ndarray
    starts: np.ndarray
    is_target: np.ndarray | None = None


class SampleSource(Protocol):
    """An endless sequence of samples, addressed by position. A position always holds the same sample."""

    @property
    def num_samples(self) -> int | None:
        """Different samples; None: it makes new ones without end."""
        ...

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """Ids, int64 [n], of the samples at these positions. A sample that is drawn twice keeps its id."""
        ...

    def will_read(self, sample_ids: Iterable[int]) -> None:
        """Announces samples that `read` is called for, which saves time where they come from another machine."""
        ...

    def read(self, sample_id: int) -> Sample:
        """Tokens and document starts of a sample."""
        ...

    def describe(self, sample_id: int) -> str:
        """The origin of a sample for messages: the prefix of the file and the index of the sample in it."""
        ...


def document_starts(tokens: np.ndarray, eod: int) -> np.ndarray:
    """True where a token follows an end-of-document token, bool [n]. eod = 9: [1 9 2 3 9] gives [0 0 1 0 0]."""
    starts = np.zeros(tokens.shape, bool)
    starts[1:] = tokens[:-1] == eod
    return starts
