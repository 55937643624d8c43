"""What each prediction depth reads and predicts: shifted ids, labels and masks, made on full sequences before slicing.

With t the token ids of a sample (s+1 of them), slot i (0 <= i < s) and depth k:

    depth k predicts       t[i+k+1]          (depth 0 is the main prediction, 1..D are the MTP layers)
    depth k >= 1 reads     t[i+k]
    its mask is            base_mask[i+k]    (the validity of that same target under the main prediction)

and 0 where t[i+k+1] is beyond the sample or, with separate documents, in another document. The model rolls nothing,
so context-parallel ranks need no messages for MTP.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class DepthTargets:
    """Inputs and targets of all depths; the leading axes of the tokens are between depth and sequence.

    Attributes:
        shifted_ids: int64 [D, ..., s], the ids that depths 1..D read.
        labels: int64 [1+D, ..., s], the ids that depths 0..D predict; 0 beyond the sample.
        loss_mask: float32 [1+D, ..., s], 1 where the target counts.
    """

    shifted_ids: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray


def depth_targets(
    tokens: np.ndarray, num_depths: int, loss_mask: np.ndarray, segment_ids: np.ndarray | None = None
) -> DepthTargets:
    """Shifts tokens and mask once for each depth.

    Args:
        tokens: int [..., s+1], one token more than there are slots.
        num_depths: D, the number of MTP depths; 0 gives the targets of next-token prediction.
        loss_mask: [..., s]; entry j says whether target t[j+1] counts.
        segment_ids: int [..., s+1], the document of each token, if no depth may predict across the end of a document;
            None: documents are not separated.

    Example:
        t = [5 6 7 8 9], D = 1, all valid:
        shifted_ids[0] = [6 7 8 9], labels = [[6 7 8 9], [7 8 9 0]], loss_mask = [[1 1 1 1], [1 1 1 0]].

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.2, equations 21-25.
    """
    s = tokens.shape[-1] - 1
    lead = tokens.shape[:-1]
    shifted_ids = np.zeros((num_depths, *lead, s), np.int64)
    labels = np.zeros((1 + num_depths, *lead, s), np.int64)
    mask = np.zeros((1 + num_depths, *lead, s), np.float32)
    for k in range(min(num_depths, s) + 1):
        if k > 0:
            shifted_ids[k - 1, ..., : s + 1 - k] = tokens[..., k:][..., :s]
        valid = s - k  # slots whose target t[i+k+1] is in the sample
        labels[k, ..., :valid] = tokens[..., k + 1 :]
        mask[k, ..., :valid] = loss_mask[..., k:]
        if segment_ids is not None:  # ids never decrease, so two equal ids mean one document between them
            mask[k, ..., :valid] *= segment_ids[..., :valid] == segment_ids[..., k + 1 :]
    return DepthTargets(shifted_ids, labels, mask)


def segments(starts: np.ndarray) -> np.ndarray:
    """Numbers the documents of a sample from 0.

    Args:
        starts: bool [..., n], true where a token begins a document; entry 0 is ignored.

    Returns:
        int32 [..., n], never decreasing. starts = [0 0 1 0 1] gives [0 0 1 1 2].
    """
    ids = np.cumsum(starts, axis=-1, dtype=np.int32)
    return ids - ids[..., :1]


def positions(starts: np.ndarray, reset: bool) -> np.ndarray:
    """Position ids, int64 [..., n]: 0, 1, 2 ..., which restart at each document if `reset`.

    starts = [0 0 1 0 1] gives [0 1 2 3 4], and [0 1 0 1 0] with reset.
    """
    index = np.broadcast_to(np.arange(starts.shape[-1], dtype=np.int64), starts.shape)
    if not reset:
        return index.copy()
    last_start = np.maximum.accumulate(np.where(starts, index, 0), axis=-1)
    return index - last_start


def base_loss_mask(starts: np.ndarray, mask_document_starts: bool) -> np.ndarray:
    """Validity of the target t[j+1] for each slot j, float32 [..., s] from starts [..., s+1].

    The target after an end-of-document token is the first token of the next document; with `mask_document_starts`
    it carries no loss at any depth. starts = [0 0 1 0] gives [1 0 1].
    """
    if not mask_document_starts:
        return np.ones((*starts.shape[:-1], starts.shape[-1] - 1), np.float32)
    return (~starts[..., 1:]).astype(np.float32)
