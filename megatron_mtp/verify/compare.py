"""The difference of one layout from the one-rank reference, and the tolerances.

Tolerances, in fp32:
    losses     |a - b| <= 2e-6 * |b| for each depth; a depth without a valid target is NaN on both sides.
    counts     of targets and of acceptance: equal.
    routing    equal, and compared first: once a token goes to another expert, nothing else is comparable.
    gradients  |g - r| <= 5e-6 * max(|r|, 1e-3 * |G| / sqrt(n)) for each parameter tensor, in the 2-norm, where r is its
               reference, |G| the norm of the complete reference gradient and n the number of parameter tensors. The
               sharded state dict defines a tensor: layers, experts, gate and up projections are separate ones. The
               floor, a thousandth of a typical tensor's norm, keeps rounding from deciding about tiny gradients.
               With linear attention the tolerance is 2e-4: a head that forgets at once gives (q k) v, of which the
               following norm keeps little more than the sign of q k, and rounding grows where q k is near zero: up to
               5e-5 on one processor and 8.5e-5 on another, in the weight of that norm.
    copies     gradients of a replicated parameter on two ranks: as gradients. Initial weights: equal bit for bit.
    curve      |a - b| <= 1e-5 * |b| for each depth and optimizer step, up to the first step with another routing.
               With linear attention 2e-4: rounding doubles at each step. One rank with micro-batches of one and of two
               differs by 5e-8 at the first step and by 2e-5 at the tenth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mtp.verify.measure import Measurement
from megatron_mtp.verify.routing import RouterCall

LOSS_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 5e-6
CURVE_TOLERANCE = 1e-5
GRADIENT_FLOOR = 1e-3
LINEAR_ATTENTION_TOLERANCE, LINEAR_ATTENTION_MARK = 2e-4, ".A_log"


@dataclass(frozen=True, slots=True)
class Difference:
    """One layout against the reference.

    Attributes:
        losses: relative difference of each depth's loss; 0 where both have no target.
        router: the same for each router loss.
        counts_equal, acceptance_equal, weights_equal: exact comparisons.
        routing_changes: tokens that were sent to other experts, summed over routers.
        gradient, gradient_name: worst |g - r| / max(|r|, floor) and its parameter.
        spread, spread_name: the same of two ranks' copies, largest element against the same floor.
        weights_name: a parameter whose initial weights differ or are missing.
        curve: worst relative difference of a loss over the steps compared; None: no curve was measured.
        curve_steps: steps compared; fewer than measured where routing changed.
        gradient_allowed: for `gradient` and `spread`.
        curve_allowed: for `curve`.
    """

    losses: list[float]
    router: dict[str, float]
    counts_equal: bool
    acceptance_equal: bool
    routing_changes: int
    gradient: float
    gradient_name: str
    spread: float
    spread_name: str
    weights_equal: bool
    weights_name: str | None = None
    curve: float | None = None
    curve_steps: int = 0
    gradient_allowed: float = GRADIENT_TOLERANCE
    curve_allowed: float = CURVE_TOLERANCE

    def faults(self) -> list[str]:
        """Every difference beyond its tolerance, in words; empty if the layout is right."""
        if self.routing_changes:
            return [f"{self.routing_changes} tokens went to other experts; nothing else is comparable"]
        found = [
            f"loss of depth {depth} differs by {value:.1e} (allowed {LOSS_TOLERANCE:.0e})"
            for depth, value in enumerate(self.losses)
            if not value <= LOSS_TOLERANCE
        ]
        found += [
            f"{name} differs by {value:.1e} (allowed {LOSS_TOLERANCE:.0e})"
            for name, value in self.router.items()
            if not value <= LOSS_TOLERANCE
        ]
        if not self.counts_equal:
            found.append("counts of valid targets differ")
        if not self.acceptance_equal:
            found.append("acceptance counts differ")
        if not self.gradient <= self.gradient_allowed:
            found.append(
                f"gradient of {self.gradient_name} differs by {self.gradient:.1e} (allowed {self.gradient_allowed:.0e})"
            )
        if not self.spread <= self.gradient_allowed:
            found.append(f"ranks hold different gradients of {self.spread_name}, by {self.spread:.1e}")
        if not self.weights_equal:
            found.append(f"initial weights of {self.weights_name} differ")
        if self.curve is not None and not self.curve <= self.curve_allowed:
            found.append(f"the curve differs by {self.curve:.1e} (allowed {self.curve_allowed:.0e})")
        return found


def compare(got: Measurement, reference: Measurement) -> Difference:
    """The difference of a layout from the reference."""
    gradients = relative_errors(got.gradients, reference.gradients)
    scales = _scales(reference.gradients)
    spread = {name: _finite(value / scales[name]) for name, value in got.gradient_spread.items() if name in scales}
    spread = spread or {"no parameter": 0.0}
    worst, spread_name = max(gradients, key=gradients.__getitem__), max(spread, key=spread.__getitem__)
    weights_name = _unequal_weights(got, reference)
    has_linear_attention = any(name.endswith(LINEAR_ATTENTION_MARK) for name in reference.weights)
    steps = _steps_with_equal_routing(got, reference)
    pairs = [pair for step in range(steps) for pair in zip(got.curve[step], reference.curve[step], strict=True)]
    return Difference(
        losses=[relative(a, b) for a, b in zip(got.losses, reference.losses, strict=True)],
        router={name: relative(got.router.get(name, math.nan), value) for name, value in reference.router.items()},
        counts_equal=got.counts == reference.counts,
        acceptance_equal=got.acceptance == reference.acceptance,
        routing_changes=_routing_changes(got.routing, reference.routing),
        gradient=gradients[worst],
        gradient_name=worst,
        spread=spread[spread_name],
        spread_name=spread_name,
        weights_equal=weights_name is None and not any(got.weight_spread.values()),
        weights_name=weights_name or next((name for name, value in got.weight_spread.items() if value), None),
        curve=max((relative(a, b) for a, b in pairs), default=0.0) if reference.curve else None,
        curve_steps=steps,
        gradient_allowed=LINEAR_ATTENTION_TOLERANCE if has_linear_attention else GRADIENT_TOLERANCE,
        curve_allowed=LINEAR_ATTENTION_TOLERANCE if has_linear_attention else CURVE_TOLERANCE,
    )


def relative(value: float, reference: float) -> float:
    """|a - b| / |b|; 0 where both are NaN or equal."""
    if value == reference or (math.isnan(value) and math.isnan(reference)):
        return 0.0
    return abs(value - reference) / abs(reference) if reference else math.inf


def relative_errors(got: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """|g - r| / max(|r|, floor) of each tensor in the 2-norm; infinite where one side lacks the tensor."""
    errors = dict.fromkeys(sorted(got.keys() ^ reference.keys()), math.inf)
    for name, scale in _scales(reference).items():
        if name in got:
            g, r = _without_padding(got[name].double(), reference[name].double())
            errors[name] = _finite(float((g - r).norm()) / scale)
    return errors


def _scales(reference: dict[str, Tensor]) -> dict[str, float]:
    """max(|r|, floor) of each tensor, with the floor of the module's docstring."""
    norms = {name: float(tensor.double().norm()) for name, tensor in reference.items()}
    floor = GRADIENT_FLOOR * math.sqrt(sum(norm**2 for norm in norms.values())) / math.sqrt(len(norms)) or 1.0
    return {name: max(norm, floor) for name, norm in norms.items()}


def _without_padding(g: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The padded vocabulary grows with tp: the shorter tensor is filled with the zeros that padding rows must have."""
    rows = max(g.shape[0], r.shape[0])
    filled = [torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])]) if len(x) < rows else x for x in (g, r)]
    return filled[0], filled[1]


def _unequal_weights(got: Measurement, reference: Measurement) -> str | None:
    if names := got.weights.keys() ^ reference.weights.keys():
        return min(names)
    for name, expected in reference.weights.items():
        rows = min(len(expected), len(got.weights[name])) if expected.dim() else None
        a, b = (got.weights[name], expected) if rows is None else (got.weights[name][:rows], expected[:rows])
        if not torch.equal(a, b):
            return name
    return None


def _routing_changes(got: dict[RouterCall, Tensor], reference: dict[RouterCall, Tensor]) -> int:
    if got.keys() != reference.keys():
        return sum(maps.shape[0] * maps.shape[1] for maps in reference.values()) or 1
    return sum(int((got[call] != maps).any(dim=-1).sum()) for call, maps in reference.items())


def _steps_with_equal_routing(got: Measurement, reference: Measurement) -> int:
    for step, maps in enumerate(reference.routing_curve):
        if _routing_changes(got.routing_curve[step], maps):
            return step
    return len(reference.curve)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
