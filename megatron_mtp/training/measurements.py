"""What is measured in some steps only: MTP's share of the trunk's gradient, changes of its weights, experts' loads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_mtp.config.filled import filled
from megatron_mtp.mcore.router import RouterLoads
from megatron_mtp.model.sharded import unwrap
from megatron_mtp.model.trunk_gradient import TrunkGradient
from megatron_mtp.parallel.resolve import ResolvedRun


class Measurements:
    """Measures every `logger.health_interval` steps. One collective over all ranks in such a step.

    Args:
        run: the resolved run.
        chunks: of this rank.
        groups: process groups of the layout.
        device: where the model is.
    """

    def __init__(
        self, run: ResolvedRun, chunks: Sequence[nn.Module], groups: ProcessGroupCollection, device: torch.device
    ):
        models: list[Any] = [unwrap(chunk) for chunk in chunks]  # MTPModel behind its wrappers
        self._trunks: list[TrunkGradient] = [model.trunk_gradient for model in models if model.mtp_process]
        self._has_mtp = run.depths.count > 0
        self._layers = weights_of_mtp_layers(models, run.depths.distinct)
        self._squares = torch.zeros(len(self._layers), dtype=torch.float64, device=device)
        self._norms: list[float] = []
        self._rows = row_names(run)
        self._loads: RouterLoads | None = None
        if self._rows:
            layers, experts = run.cfg.model.num_layers, filled(run.cfg.model.num_moe_experts)
            self._loads = RouterLoads(models, layers, experts, max(self._rows) + 1, device)
        self._interval = run.cfg.logger.health_interval
        # Without sequence parallelism every tensor-parallel rank holds the same gradient.
        self._counts = run.cfg.model.sequence_parallel or groups.tp.rank() == 0
        self._scale = float(groups.dp_cp.size())  # see StepObjective.loss_function
        self._device = device
        self._is_on = False

    def begin(self, iteration: int) -> None:
        """Called before the passes of step `iteration`."""
        self._is_on = self._interval is not None and iteration % self._interval == 0
        for trunk in self._trunks:
            trunk.begin(is_on=self._is_on)
        if self._loads is not None:
            self._loads.begin(is_on=self._is_on)
        for k, parameters in enumerate(self._layers if self._is_on else ()):
            norms = [torch.linalg.vector_norm(one.detach(), dtype=torch.float64) for one in parameters]
            self._squares[k] = sum(norm.square() for norm in norms)

    def read(self, loss_scale: float) -> dict[str, float]:
        """The metrics of the step that has just been done, the same on every rank; none if it was not measured.

        `lm/trunk_gradient`, `mtp/trunk_gradient`: L2 norms of the two parts of d total / d (trunk's output) over the
        global batch. `mtp/gradient_share`: the second over the sum of both. `mtp_k/weight_change`: by which part the L2
        norm of the weights of MTP layer k has changed since they were last measured. `moe/max_load_layer_I`,
        `moe/max_load_mtp_layer_K`: tokens of the most loaded expert over the mean of its layer. `moe/max_load`,
        `moe/min_load`: the largest of these, and the smallest load of any expert in the same unit. `moe/largest_share`:
        the largest share of a layer's tokens that one expert gets.

        Args:
            loss_scale: of fp16, in this step.
        """
        if not self._is_on or not (self._has_mtp or self._loads):
            return {}
        found = torch.zeros(2, dtype=torch.float64, device=self._device)
        for trunk in self._trunks if self._counts else []:
            for part, square in enumerate(trunk.squares):
                if square is not None:
                    found[part] += square.double()
        found = torch.cat((found, self._squares))
        if self._loads is not None:
            found = torch.cat((found, self._loads.counts.flatten().double()))
        dist.all_reduce(found)
        squares, weights, counts = (part.tolist() for part in found.tensor_split((2, 2 + len(self._layers))))
        metrics = gradient_share(*(math.sqrt(s) / (self._scale * loss_scale) for s in squares)) if any(squares) else {}
        before, self._norms = self._norms, [math.sqrt(square) for square in weights]
        metrics |= weight_changes(before, self._norms)
        if self._loads is not None:
            experts = self._loads.counts.shape[1]
            layers = {name: counts[row * experts : (row + 1) * experts] for row, name in self._rows.items()}
            metrics |= expert_loads(layers)
        return metrics


def row_names(run: ResolvedRun) -> dict[int, str]:
    """Row of a layer with experts in the counts -> its name, `layer_I` or `mtp_layer_K`, from 0."""
    if not run.cfg.model.num_moe_experts:
        return {}
    names = {idx: f"layer_{idx}" for idx, is_moe in enumerate(run.is_moe) if is_moe}
    if run.mtp_kind == "moe":
        names |= {run.cfg.model.num_layers + k: f"mtp_layer_{k}" for k in range(run.depths.distinct)}
    return names


def weights_of_mtp_layers(models: Sequence[Any], num_layers: int) -> list[list[nn.Parameter]]:
    """The parameters of each MTP layer of the run; none on a rank without them. A repeated layer is one."""
    layers = [layer for model in models if model.mtp_process for layer in model.mtp.layers]
    return [list(layer.parameters()) for layer in layers] or [[] for _ in range(num_layers)]


def weight_changes(before: Sequence[float], now: Sequence[float]) -> dict[str, float]:
    """Metrics of the norms of each MTP layer's weights at two measurements; none at the first one.

    Example: 2.0, then 2.001, are a change of 0.0005.
    """
    pairs = zip(before, now, strict=True) if before else ()
    return {f"mtp_{k}/weight_change": abs(new / old - 1) for k, (old, new) in enumerate(pairs, start=1) if old}


def gradient_share(main: float, mtp: float) -> dict[str, float]:
    """Metrics of the two norms.

    Example: 3.0 of the main head and 1.0 of the MTP layers are a share of 0.25.
    """
    return {"lm/trunk_gradient": main, "mtp/trunk_gradient": mtp, "mtp/gradient_share": mtp / (main + mtp)}


def expert_loads(layers: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Metrics of the tokens of each expert, for each layer by its name.

    Example: a layer with 6, 2, 4 and 4 tokens has a largest load of 1.5, a smallest of 0.5, a largest share of 0.375.
    """
    metrics: dict[str, float] = {}
    smallest, share = math.inf, 0.0
    for name, tokens in layers.items():
        total = sum(tokens)
        if not total:
            continue
        mean = total / len(tokens)
        metrics[f"moe/max_load_{name}"] = max(tokens) / mean
        smallest, share = min(smallest, min(tokens) / mean), max(share, max(tokens) / total)
    if metrics:
        metrics |= {"moe/max_load": max(metrics.values()), "moe/min_load": smallest, "moe/largest_share": share}
    return metrics
