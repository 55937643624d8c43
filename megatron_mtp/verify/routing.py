"""Records the experts of every token, in the order of the global batch at any layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_mtp.data.zigzag import zigzag_index

# Router's name in the complete model, and the number of its call for one micro-batch: a repeated MTP layer makes D.
RouterCall = tuple[str, int]


@dataclass(frozen=True, slots=True)
class RoutingPart:
    """One router call on one rank.

    Attributes:
        places: of the samples in the global batch, [b].
        positions: of the slots in the sequence, [s'].
        chosen: bool [b, s', E].
    """

    call: RouterCall
    places: np.ndarray
    positions: np.ndarray
    chosen: Tensor


class RoutingRecorder:
    """Records the routers of this rank during one forward and backward pass.

    Args:
        chunks: unwrapped model chunks of this rank.
        places: [micro-batches, b], the samples of each micro-batch.
        seq_length: s of the complete sequence.
        groups: tp and cp say which slots this rank routes.
        sequence_parallel: each router sees 1/tp of the rank's slots.
    """

    def __init__(
        self,
        chunks: list[nn.Module],
        places: np.ndarray,
        seq_length: int,
        groups: ProcessGroupCollection,
        *,
        sequence_parallel: bool,
    ):
        self._places = places
        self._positions = zigzag_index(seq_length, groups.cp.rank(), groups.cp.size())
        if sequence_parallel:
            self._positions = np.split(self._positions, groups.tp.size())[groups.tp.rank()]
        self._maps: dict[str, list[Tensor]] = {}
        self._hooks = [
            module.register_forward_hook(self._keep(name)) for chunk in chunks for name, module in _named_routers(chunk)
        ]

    def _keep(self, name: str) -> Callable[..., None]:
        maps = self._maps.setdefault(name, [])

        def hook(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
            is_forward = torch._C._current_graph_task_id() == -1
            if is_forward:  # in the backward pass a recomputed layer calls its router again
                maps.append(output[1].detach().bool().clone())

        return hook

    def parts(self) -> list[RoutingPart]:
        """Ends the recording and returns it, by router and micro-batch."""
        for hook in self._hooks:
            hook.remove()
        found = []
        for name, maps in self._maps.items():
            calls: Counter[int] = Counter()
            per_batch = len(maps) // len(self._places)
            assert per_batch * len(self._places) == len(maps), f"{name}: {len(maps)} calls for {len(self._places)}"
            for index, chosen in enumerate(maps):
                row = self._places[index // per_batch]
                # [s' * b, E] -> [b, s', E]
                complete = chosen.unflatten(0, (len(self._positions), len(row))).transpose(0, 1)
                found.append(RoutingPart((name, calls[index // per_batch]), row, self._positions, complete))
                calls[index // per_batch] += 1
        return found


def gather_routing(parts: list[RoutingPart], num_samples: int, seq_length: int) -> dict[RouterCall, Tensor] | None:
    """All ranks' maps as [B, s, E] on rank 0, None elsewhere.

    Raises:
        ValueError: two ranks that routed the same token chose different experts, or no rank routed some token.
    """
    size = dist.get_world_size()
    gathered: list[list[RoutingPart]] | None = [[] for _ in range(size)] if dist.get_rank() == 0 else None
    dist.gather_object(parts, gathered)
    if gathered is None:
        return None
    complete: dict[RouterCall, Tensor] = {}
    seen: dict[RouterCall, Tensor] = {}
    for part in (part for rank in gathered for part in rank):
        num_experts = part.chosen.shape[-1]
        target = complete.setdefault(part.call, torch.zeros(num_samples, seq_length, num_experts, dtype=torch.bool))
        known = seen.setdefault(part.call, torch.zeros(num_samples, seq_length, dtype=torch.bool))
        box = np.ix_(part.places, part.positions)
        if (target[box] != part.chosen)[known[box]].any():
            raise ValueError(f"{part.call}: two ranks sent the same token to different experts")
        target[box] = part.chosen
        known[box] = True
    if holes := [call for call, known in seen.items() if not known.all()]:
        raise ValueError(f"no rank routed some token of {holes}")
    return dict(sorted(complete.items()))


def _named_routers(chunk: Any) -> list[tuple[str, TopKRouter]]:
    """Routers by their name in the complete model: a stage counts its decoder layers from 0."""
    first = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    found = []
    for name, module in chunk.named_modules():
        if not isinstance(module, TopKRouter):
            continue
        if name.startswith("decoder.layers."):
            local, rest = name.removeprefix("decoder.layers.").split(".", 1)
            name = f"decoder.layers.{int(local) + first}.{rest}"
        found.append((name, module))
    return found
