"""A round with a draft tree: several candidates at a depth, all verified in one pass of the main model.

It pays where verifying more tokens costs next to nothing (a big model at batch 1, bound by reading its weights) and the second most
probable draft is often the right one. The drafter runs once for each path, since a path's tokens stand in the same slots of its caches.
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
        session: of one row.
        widths: children of each node at depth 1, 2, ...: (3, 1) drafts three candidates, and one token behind each.
    """

    def __init__(self, session: Session, widths: tuple[int, ...]):
        self.session, self.widths, self.depth = session, widths, len(widths)

    def run(self) -> list[int]:
        """Drafts, verifies and commits. Returns the tokens of this round: accepted drafts and the one behind them."""
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
        # Only the last path's tokens stand in the caches of the depths: from depth 2 on they are drafted anew.
        session.commit(self.depth, [0], [0], [False])
        session.tokens[0, start + 1 + len(accepted)] = following
        session.lengths[0] += len(accepted) + 1
        return [*accepted, following]

    def _draft(self) -> tuple[list[int], list[int]]:
        """Tokens and parents of all nodes; node 0 is the last settled token."""
        session = self.session
        ids, parents = [int(session.tokens[0, session.lengths[0] - 1])], [-1]
        pending: list[tuple[int, list[int]]] = [(0, [])]
        while pending:
            node, path = pending.pop()
            pending += self._follow(node, path, ids, parents)
        return ids, parents

    def _follow(self, node: int, path: list[int], ids: list[int], parents: list[int]) -> list[tuple[int, list[int]]]:
        """Runs the drafter along `path`, the drafts that lead to `node`, and on along first candidates to the last depth.

        Returns:
            Candidates beside that way that have depths below them still to be drafted: node and path of each.
        """
        aside: list[tuple[int, list[int]]] = []
        way = list(path)
        given = iter(path)

        def pick(logits: Tensor) -> Tensor:
            nonlocal node
            token = next(given, None)
            if token is None:
                candidates = logits[0].topk(self.widths[len(way)]).indices.tolist()
                first, token = len(ids), candidates[0]
                ids.extend(candidates)
                parents.extend([node] * len(candidates))
                if len(way) + 1 < self.depth:
                    aside.extend((first + i, [*way, other]) for i, other in enumerate(candidates) if i)
                node = first
                way.append(token)
            return torch.tensor([token], device=logits.device)

        self.session.draft(self.depth, pick)
        return aside

    def _verify(self, ids: list[int], parents: list[int]) -> list[int]:
        """The token that greedy decoding takes behind each node."""
        session, decoder = self.session, self.session.decoder
        span = TreeSpan(session.lengths[0] - 1, parents, session.masks, session.cis)
        tokens = torch.tensor([ids], device=session.tokens.device)
        hidden, source = decoder.trunk(tokens, span, session.trunk_caches)
        session.sources[:, span.start : span.stop] = source[None]
        return decoder.logits(hidden).argmax(dim=-1).tolist()


def round_tokens(num_drafts: int, widths: tuple[int, ...] | None) -> int:
    """Drafts of one round: of a chain, or all nodes of a tree. Widths (2, 2): 2 + 4 = 6."""
    return num_drafts if widths is None else sum(math.prod(widths[: k + 1]) for k in range(len(widths)))
