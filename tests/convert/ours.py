"""Our model from a folder, on the ranks of a pool: logits of every depth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.harness.runs import joined


@dataclass
class _Ids:
    """What MTPModel asks of its context."""

    shifted_ids: Tensor


@contextmanager
def built(source: str, changes: dict[str, Any], **options: Any) -> Iterator[tuple[Any, list, Any]]:
    """(cfg, chunks, groups) of the model in `source`, its weights loaded, at the layout in `changes`."""
    from megatron_mtp.convert.load import config_of, load_weights
    from megatron_mtp.model.build import build_model

    cfg = config_of(source)
    cfg.train.global_batch_size, cfg.train.micro_batch_size = 8, 1
    cfg.dist.device, cfg.dist.num_threads = "cpu", 1
    for name, value in changes.items():
        setattr(cfg.model, name, value)
    with joined(cfg.finalize(dist.get_world_size())) as (resolved, groups):
        chunks = build_model(resolved, groups, torch.device("cpu"))
        load_weights(chunks, source, cfg, groups, **options)
        yield cfg, chunks, groups


@torch.no_grad()
def forward(cfg: Any, chunk: Any, groups: Any, ids: Tensor) -> Tensor | None:
    """Logits [1 + D, b, s, v] on the last stage, None elsewhere; depth k reads ids rolled by k."""
    depths = cfg.model.mtp_num_layers
    rolled = torch.stack([torch.roll(ids, -k, dims=1) for k in range(1, depths + 1)]) if depths else ids.new_zeros(0)
    chunk.eval()
    pp, rank = groups.pp, groups.pp.rank()
    if rank > 0:
        hidden = torch.empty(ids.shape[1], ids.shape[0], cfg.model.hidden_size)
        dist.recv(hidden, src=dist.get_global_rank(pp, rank - 1), group=pp)
        chunk.set_input_tensor(hidden)
    out = chunk(
        input_ids=ids,
        position_ids=torch.arange(ids.shape[1]).expand_as(ids),
        attention_mask=None,
        output_processor=lambda states, weight, _: _logits(states, weight, groups.tp, cfg.model),
        output_processor_context=_Ids(rolled),
    )
    if rank < pp.size() - 1:
        dist.send(out.contiguous(), dst=dist.get_global_rank(pp, rank + 1), group=pp)
        return None
    return out


def _logits(states: Tensor, weight: Tensor, tp: Any, model: Any) -> Tensor:
    """states: [1 + D, s, b, h], s divided by tp under sequence parallelism; weight: [v/tp, h]."""
    if model.sequence_parallel and tp.size() > 1:
        states = torch.cat(_gathered(states, tp), dim=1)
    whole = torch.cat(_gathered(states @ weight.T, tp), dim=-1)
    return whole[..., : model.vocab_size].transpose(1, 2)


def _gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def logits(source: str, ids: Tensor, changes: dict[str, Any], options: dict[str, Any] | None = None) -> Tensor | None:
    """The work of one rank of a pool: build, load, run."""
    with built(source, changes, **(options or {})) as (cfg, chunks, groups):
        return forward(cfg, chunks[0], groups, ids)
