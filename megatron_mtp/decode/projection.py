"""Initialises the projection of a new MTP layer so that its transformer layer gets the input it knows.

A new MTP layer is a copy of the trunk's last layer, which reads the residual stream x of the layers below it. Depth k
at slot i replaces the trunk's last layer at slot i+k, so its projection M is fitted by least squares,

    minimise over M   sum_i  |M [enorm(Emb(t[i+k])); hnorm(h_{k-1}[i])] - x[i+k]|^2 / |x[i+k]|^2  +  ridge |M|^2

which needs one forward pass over some text and no training. The weights 1 / |x|^2 make the error of each slot relative,
because attention and feed-forward begin with norms. With SmolLM2-135M the drafts of such a layer agree with the model
at 37 % of slots before the first step; a random projection needs some hundred steps to get there (docs/decoding.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_mtp.config.filled import filled
from megatron_mtp.decode.linear import linear
from megatron_mtp.decode.model import Decoder
from megatron_mtp.decode.span import Span
from megatron_mtp.errors import UnsupportedError

RIDGE = 1e-3
"""Relative to the mean square of the inputs: keeps weights small in directions that are rare in the text."""


@dataclass(frozen=True, slots=True)
class FittedProjection:
    """The fitted projection of one MTP layer.

    Args:
        weight: [h, 2h] fp32, embedding first, for inputs normed without scale. Divided by the scales of enorm and hnorm
            it is the weight for a checkpoint.
        unexplained: remaining share of the squared norm of the layer's usual input, on the text of the fit.
        agreement: share of slots of other text at which the draft is the model's most probable token.
    """

    weight: Tensor
    unexplained: float
    agreement: float


def fit_projections(
    decoder: Decoder, documents: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], ridge: float = RIDGE
) -> list[FittedProjection]:
    """Fits the MTP layers in order, each on the outputs of the ones before it. `decoder` then uses the new projections.

    Args:
        documents: token ids; each document fits in the context.
        held_out: token ids to count agreement on.

    Raises:
        UnsupportedError: there is no projection, or a layer is not a copy of the trunk's last one.
    """
    _refuse(decoder, documents[0])
    found = []
    for number in range(1, len(decoder.depths) + 1):
        weight, unexplained = _fit(decoder, documents, number, ridge)
        depth = decoder.depths[number - 1]
        fitted = replace(filled(depth.input), projection=linear(weight.to(decoder.device, decoder.dtype)))
        decoder.depths[number - 1] = replace(depth, input=fitted)
        found.append(FittedProjection(weight, unexplained, _agreement(decoder, held_out, number)))
    return found


def _refuse(decoder: Decoder, document: Sequence[int]) -> None:
    if decoder.tp.size > 1:
        raise UnsupportedError("projections are fitted on one rank: use tensor_model_parallel_size = 1.")
    if decoder.is_parallel or not decoder.depths:
        reason = f"mtp_variant = {decoder.model.mtp_variant}" if decoder.depths else "mtp_num_layers = 0"
        raise UnsupportedError(f"model.{reason}: there is no projection to fit.")
    with torch.inference_mode():
        pass_ = _Pass(decoder, document)
        for number, depth in enumerate(decoder.depths, start=1):
            copy = depth.block(pass_.below, pass_.span, pass_.depth_caches[number - 1])
            if not torch.allclose(copy, pass_.top, rtol=1e-3, atol=1e-3 * float(pass_.top.abs().max())):
                raise UnsupportedError(
                    f"MTP layer {number} is not a copy of the last decoder layer: it was trained or randomly "
                    "initialised. Import the model with --mtp-init last_layer and fit before training."
                )


def _fit(decoder: Decoder, documents: Sequence[Sequence[int]], number: int, ridge: float) -> tuple[Tensor, float]:
    h = decoder.model.hidden_size
    square = torch.zeros(2 * h, 2 * h, dtype=torch.float64, device=decoder.device)
    cross = torch.zeros(2 * h, h, dtype=torch.float64, device=decoder.device)
    total = 0.0
    for rows, target in _equations(decoder, documents, number):
        scale = target.pow(2).mean(dim=-1, keepdim=True).rsqrt()
        rows, target = rows * scale, target * scale
        square += rows.T @ rows
        cross += rows.T @ target
        total += float(target.pow(2).sum())
    damped = square + ridge * square.diagonal().mean() * torch.eye(2 * h, dtype=torch.float64, device=decoder.device)
    solution = torch.linalg.solve(damped, cross)
    left = total - float(2 * (solution * cross).sum() - (solution * (square @ solution)).sum())
    return solution.T.float().cpu(), left / total


def _equations(decoder: Decoder, documents: Sequence[Sequence[int]], number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(input of the projection [n, 2h], usual input of the layer [n, h]) of each document, fp64."""
    inputs = filled(decoder.depths[number - 1].input)
    for ids in documents:
        if len(ids) <= number:
            continue
        with torch.inference_mode():
            pass_ = _Pass(decoder, ids)
            hidden = pass_.hidden(number - 1)
            embedded = decoder.embed(pass_.tokens[0, number:])
            yield inputs.normed(embedded, hidden[: len(ids) - number]).double(), pass_.below[number:].double()


def _agreement(decoder: Decoder, documents: Sequence[Sequence[int]], number: int) -> float:
    agreed = counted = 0
    for ids in documents:
        if len(ids) <= number:
            continue
        with torch.inference_mode():
            pass_ = _Pass(decoder, ids)
            drafts = decoder.logits(pass_.hidden(number)).argmax(dim=-1)
            taken = decoder.logits(pass_.normed[number:]).argmax(dim=-1)
        agreed += int((drafts[: len(taken)] == taken).sum())
        counted += len(taken)
    return agreed / max(1, counted)


class _Pass:
    """The trunk's pass over one document of n tokens: residual stream [n, h] `below` and on `top` of its last layer."""

    def __init__(self, decoder: Decoder, ids: Sequence[int]):
        self.decoder = decoder
        self.tokens = torch.tensor([ids], device=decoder.device)
        masks, self._rotations = decoder.positions(len(ids))
        self._masks = masks
        self.span = Span([0], len(ids), masks, self._rotations)
        caches, self.depth_caches = decoder.new_caches(1, len(ids), len(decoder.depths))
        self.below = decoder.below_last(self.tokens, self.span, caches)
        self.top = decoder.blocks[-1](self.below, self.span, caches[-1])
        self.normed = decoder.final_norm(self.top)

    def hidden(self, number: int) -> Tensor:
        """[n - number, h]: output of depth `number`; for 0, what depth 1 reads."""
        if number == 0:
            return self.top if self.decoder.model.mtp_hidden_source == "pre_final_norm" else self.normed
        n = self.tokens.shape[1] - number
        span = Span([0], n, self._masks, self._rotations)
        cache = self.depth_caches[number - 1]
        return self.decoder.depth(number, self.hidden(number - 1)[:n], self.tokens[:, number:], span, cache)
