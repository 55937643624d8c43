"""A round with a draft tree: several candidates per depth, all verified in one pass of the main model.

It pays if verifying more tokens costs almost nothing (a big model at batch 1, bound by reading its weights) and the
second most probable draft is often right. The drafter runs once per path, since all paths use the same slots of its
caches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_mtp.decode.session import Session
from megatron_mtp.decode.span import TreeSpan


class TreeRound:
    """Rounds of one row, decoded greedily.

    Args:
        session: a session with one row.
        widths: children of each node at depth 1, 2, ...: (3, 1) drafts three candidates and one token after each.
    """

    def __init__(self, session: Session, widths: tuple[int, ...]):
        self.session, self.widths, self.depth = session, widths, len(widths)

    def run(self) -> list[int]:
        """Drafts, verifies and commits. Returns this round's tokens: the accepted drafts and the token after them."""
        ids, parents = self._draft()
        session = self.session
        best = self._verify(ids, parents)
        path, node = [0], 0
        while (
            child := next((c for c, p in enumerate(parents) if p == node and ids[c] == best[node]), None)
        ) is not None:
            node = child
            path.append(node)
        start = session.lengths[0] - 1
        for cache in session.trunk_caches:
            cache.keep(start, [start + n for n in path])
        session.sources[:, start : start + len(path)] = session.sources[:, [start + n for n in path]]
        accepted, following = [ids[n] for n in path[1:]], best[node]
        session.tokens[0, start + 1 : start + 1 + len(accepted)] = torch.tensor(
            accepted, dtype=torch.int64, device=session.tokens.device
        )
        # The depths' caches hold only the last path's tokens, so none is committed there: the next round fills them
        # again.
        session.commit(self.depth, [0], [0], [False])
        session.tokens[0, start + 1 + len(accepted)] = following
        session.lengths[0] += len(accepted) + 1
        return [*accepted, following]

    def _draft(self) -> tuple[list[int], list[int]]:
        """Tokens and parents of all nodes; node 0 is the last accepted token."""
        session = self.session
        ids, parents = [int(session.tokens[0, session.lengths[0] - 1])], [-1]
        pending: list[tuple[int, list[int]]] = [(0, [])]
        while pending:
            node, path = pending.pop()
            pending += self._follow(node, path, ids, parents)
        return ids, parents

    def _follow(self, node: int, path: list[int], ids: list[int], parents: list[int]) -> list[tuple[int, list[int]]]:
        """Runs the drafter along `path`, the drafts that lead to `node`, then along first candidates to the last depth.

        Returns:
            (node, path) of the other candidates that need drafts below them.
        """
        others: list[tuple[int, list[int]]] = []
        taken = list(path)
        given = iter(path)

        def pick(logits: Tensor) -> Tensor:
            nonlocal node
            token = next(given, None)
            if token is None:
                candidates = logits[0].topk(self.widths[len(taken)]).indices.tolist()
                first, token = len(ids), candidates[0]
                ids.extend(candidates)
                parents.extend([node] * len(candidates))
                if len(taken) + 1 < self.depth:
                    others.extend((first + i, [*taken, other]) for i, other in enumerate(candidates) if i)
                node = first
                taken.append(token)
            return torch.tensor([token], device=logits.device)

        self.session.draft(self.depth, pick)
        return others

    def _verify(self, ids: list[int], parents: list[int]) -> list[int]:
        """The token that greedy decoding chooses after each node."""
        session, decoder = self.session, self.session.decoder
        span = TreeSpan(session.lengths[0] - 1, parents, session.masks, session.cis)
        tokens = torch.tensor([ids], device=session.tokens.device)
        hidden, source = decoder.trunk(tokens, span, session.trunk_caches)
        session.sources[:, span.start : span.stop] = source[None]
        return decoder.logits(hidden).argmax(dim=-1).tolist()


def round_tokens(num_drafts: int, widths: tuple[int, ...] | None) -> int:
    """Number of drafts per round: those of a chain, or all nodes of a tree. Widths (2, 2): 2 + 4 = 6."""
    return num_drafts if widths is None else sum(math.prod(widths[: k + 1]) for k in range(len(widths)))
