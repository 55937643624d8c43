"""Runs one training step of the program on one rank and of the plain model in fp64, on the same weights and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from megatron_mtp.config import ConfigContainer
from megatron_mtp.verify.batches import ArraySource
from tests.model.plain_to_config import SEQ_LENGTH, run_config
from tests.reference.plain_model import PlainConfig, PlainMTPModel, combine
from tests.reference.weights import gradients_as_megatron, weights_as_megatron

if TYPE_CHECKING:
    from megatron_mtp.training.setup import Run  # imports megatron, which takes seconds

Batches = list[dict[str, Tensor | None]]
"""Arguments of PlainMTPModel.forward, one dict for each micro-batch."""


@dataclass
class StepResults:
    """What is compared. `gradients` and `expert_biases` have Megatron's names and layouts."""

    losses: list[float]
    counts: list[int]
    acceptance: list[list[int]]
    gradients: dict[str, Tensor]
    routing_maps: list[Tensor]
    """[b, s, E] bool of each router call: micro-batch by micro-batch, trunk layers, then depths."""
    expert_biases: dict[str, Tensor] = field(default_factory=dict)
    router: dict[str, float] = field(default_factory=dict)


def plain_model(plain: PlainConfig) -> PlainMTPModel:
    """The plain model in fp64."""
    model = PlainMTPModel(plain)
    # Drawn in fp32, so that both sides have the same weights. At this scale, near that of initial weights, fp32 holds
    # every gradient to 2e-6; from 0.1 on, gradients of head norms cancel so strongly that the plain model in
    # fp32 misses it too.
    model.randomize(seed=3, std=0.05)
    return model.double()


def global_batch(documents: bool) -> Batches:
    """Four micro-batches of two samples: all targets valid, padded ends, random holes, no valid target at all."""
    generator = torch.Generator().manual_seed(11)
    masks = torch.ones(4, 2, SEQ_LENGTH)
    masks[1, 0, 9:] = 0
    masks[1, 1, 3:] = 0
    masks[2] = (torch.rand(2, SEQ_LENGTH, generator=generator) < 0.6).float()
    masks[3] = 0
    batches = []
    for mask in masks:
        starts = torch.rand(2, SEQ_LENGTH + 1, generator=generator) < 0.2
        batches.append(
            {
                "tokens": torch.randint(0, 50, (2, SEQ_LENGTH + 1), generator=generator),
                "base_mask": mask,
                "segment_ids": starts.cumsum(1) if documents else None,
            }
        )
    return batches


def plain_step(model: PlainMTPModel, batches: Batches) -> StepResults:
    """The step of the plain model. Updates its expert biases."""
    outputs = [model(**batch) for batch in batches]
    totals = combine(outputs)
    model.zero_grad()
    totals.total.backward()
    if model.cfg.moe is not None and model.cfg.moe.expert_bias:
        model.update_expert_biases(totals)
    biases = {name: w for name, w in weights_as_megatron(model).items() if name.endswith("expert_bias")}
    return StepResults(
        losses=totals.losses.tolist(),
        counts=totals.counts.tolist(),
        acceptance=sum(output.acceptance for output in outputs).tolist(),
        gradients=gradients_as_megatron(model),
        routing_maps=[router.chosen for output in outputs for router in output.routers],
        expert_biases=biases,
        router=_mean_over_layers(model, totals.router_losses),
    )


def _mean_over_layers(model: PlainMTPModel, router_losses: dict[str, Tensor]) -> dict[str, float]:
    """The program reports means over MoE layers, under Megatron's names, of what the total weighs."""
    moe = model.cfg.moe
    if moe is None:
        return {}
    num_layers = len(set(model.routed_blocks()))
    names = {"load_balancing_loss": ("seq_load_balancing_loss", moe.seq_aux_coeff), "z_loss": ("z_loss", moe.z_coeff)}
    return {
        reported: float(router_losses[name].detach()) / num_layers for name, (reported, coeff) in names.items() if coeff
    }


def program_step(model: PlainMTPModel, batches: Batches) -> StepResults:
    """The same step through `training.setup` and `Engine.train` on one rank, with the plain model's weights."""
    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.training.setup import setup

    run = setup(resolve(program_config(model.cfg, batches), 1))
    try:
        return step_of_chunk(run, model, batches)
    finally:
        run.close()


def program_config(plain: PlainConfig, batches: Batches, pp: int = 1) -> ConfigContainer:
    """The run that takes a step on `batches`."""
    documents = batches[0]["segment_ids"] is not None
    return run_config(plain, batches[0]["tokens"].shape[0], len(batches), pp, documents)


def step_of_chunk(run: Run, model: PlainMTPModel, batches: Batches) -> StepResults:
    """Gives the plain model's weights to the one chunk of this rank, perhaps a pipeline stage, and takes a step."""
    chunk, micro_batch_size = run.engine.chunks[0].module, batches[0]["tokens"].shape[0]
    whole_name = whole_names(chunk)
    weights = weights_as_megatron(model)
    state = {
        name: tensor if name.endswith("_extra_state") else weights[whole_name[name]].float()
        for name, tensor in chunk.state_dict().items()
    }
    chunk.load_state_dict(state, strict=True)
    maps = record_routing_maps(chunk, micro_batch_size)
    builder = run.data.builder(samples_of(batches), micro_batch_size)
    batch = builder.build(0, np.arange(micro_batch_size * len(batches)))
    result = run.engine.train(batch, loss_factor=model.cfg.mtp_lambda)
    return StepResults(
        losses=result.losses,
        counts=result.depth_counts.tolist(),
        acceptance=result.acceptance.tolist(),
        gradients={whole_name[n]: p.main_grad.clone() for n, p in chunk.named_parameters() if p.requires_grad},
        routing_maps=maps,
        expert_biases={whole_name[n]: t.clone() for n, t in chunk.state_dict().items() if n.endswith("expert_bias")},
        router=result.router,
    )


def samples_of(batches: Batches) -> ArraySource:
    """The samples of all micro-batches, as `data/` reads them."""
    tokens, masks = (np.concatenate([batch[name].numpy() for batch in batches]) for name in ("tokens", "base_mask"))
    starts = np.zeros(tokens.shape, bool)
    if batches[0]["segment_ids"] is not None:
        starts[:, 1:] = np.diff(np.concatenate([batch["segment_ids"].numpy() for batch in batches])) > 0
    return ArraySource(tokens, masks, starts)


def whole_names(chunk: nn.Module) -> dict[str, str]:
    """Name on this stage -> name in the complete model: stages count their decoder layers from 0."""
    first = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0

    def whole(name: str) -> str:
        prefix, found, rest = name.partition("decoder.layers.")
        if not found:
            return name
        local, rest = rest.split(".", 1)
        return f"{prefix}{found}{int(local) + first}.{rest}"

    return {name: whole(name) for name in chunk.state_dict()}


def record_routing_maps(chunk: nn.Module, batch_size: int) -> list[Tensor]:
    """A list that fills with the [b, s, E] map of each router call."""
    from megatron.core.transformer.moe.router import TopKRouter

    maps: list[Tensor] = []
    for module in chunk.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(partial(_record, maps, batch_size))
    return maps


def _record(maps: list[Tensor], batch_size: int, _: nn.Module, __: tuple, output: tuple[Tensor, Tensor]) -> None:
    in_backward = torch._C._current_graph_task_id() != -1  # a layer that is recomputed calls its router again
    if not in_backward:
        maps.append(_batch_first(output[1], batch_size))


def _batch_first(routing_map: Tensor, batch_size: int) -> Tensor:
    """[s * b, E] -> [b, s, E]."""
    return routing_map.bool().unflatten(0, (-1, batch_size)).transpose(0, 1).clone()
