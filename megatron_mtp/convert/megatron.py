"""Megatron-LM's and Megatron-Bridge's `torch_dist` checkpoints <-> ours, one tensor in memory at a time.

Both sides are Megatron-Core's sharded state dicts, so names, shapes and the arrangement of rows are the same; what
differs is described in `megatron_files`. Only plain data is read: nothing in their checkpoints is executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_mtp.checkpoint.preflight import tokenizer_fingerprint
from megatron_mtp.checkpoint.streaming import WeightsWriter
from megatron_mtp.checkpoint.train_state import TrainState
from megatron_mtp.config import ConfigContainer
from megatron_mtp.convert.hf_families import ARCHITECTURE
from megatron_mtp.convert.megatron_config import model_from_megatron
from megatron_mtp.convert.megatron_files import OPTIMIZER_KEY, MegatronCheckpoint, Place
from megatron_mtp.convert.report import Report
from megatron_mtp.convert.tensor_forms import finite
from megatron_mtp.device.fake import fake_world
from megatron_mtp.errors import ConversionError
from megatron_mtp.mcore.groups import destroy_model_parallel, init_model_parallel, seed_dropout
from megatron_mtp.model.build import build_model
from megatron_mtp.model.sharded import sharded_tensors
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.recipes.common import pretrain_common

VOCABULARY = re.compile(r"(.*\.)?(embedding\.word_embeddings|output_layer)\.weight")
"""Tensors whose rows beyond the vocabulary are padding."""
_MOST_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor of ours: one layer, one expert."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]


def model_boxes(cfg: ConfigContainer) -> list[Box]:
    """Every tensor of a model as one rank would save it; it is built without memory.

    Args:
        cfg: finalized, for one rank.
    """
    plain = cfg.copy()
    plain.model.backend = "torch"
    plain.dist.device = "cpu"
    run = resolve(plain.finalize(1), 1)
    with fake_world(0, 1) as device:
        groups = init_model_parallel(tp=1, pp=1, vp=None, cp=1, ep=1, etp=1, embedding_stages=[0])
        try:
            seed_dropout(plain.rng.seed, pp_rank=0)
            chunks = build_model(run, groups, device)
            return [
                Box(shard.key, tuple(shard.global_shape), tuple(shard.global_offset), _size(shard))
                for chunk in chunks
                for shard in sharded_tensors(chunk)
            ]
        finally:
            destroy_model_parallel()


def _size(shard: ShardedTensor) -> tuple[int, ...]:
    lead = shard.prepend_axis_num
    return (1,) * lead + tuple(shard.local_shape)[-(len(shard.global_shape) - lead) :]


def import_megatron(
    source: str | Path, out_dir: str | Path, cfg: ConfigContainer | None = None, *, with_optimizer: bool = False
) -> Report:
    """Writes a checkpoint with the weights of a Megatron-LM or Megatron-Bridge checkpoint.

    Args:
        source: their run directory (its latest checkpoint), or one of its iter_... folders.
        out_dir: run directory without checkpoints.
        cfg: a recipe with the architecture of the checkpoint; None: what the checkpoint says.
        with_optimizer: take the optimizer's state and the counters too, so that a run resumes there; otherwise the
            checkpoint is one of iteration 0, to start from.

    Raises:
        ConversionError: names everything that does not fit; nothing is left behind.
        CheckpointError: `out_dir` cannot be written or holds a checkpoint, or `source` is damaged.
    """
    if with_optimizer and cfg is None:
        raise ConversionError(
            "--with-optimizer: needs --recipe, with the batch, schedule, data and tokenizer of the run that goes on; a "
            "resume compares them."
        )
    theirs = MegatronCheckpoint.open(Path(source))
    final = _config(theirs, cfg)
    boxes = model_boxes(final)
    places = _places(theirs, boxes, final)
    states = _states(theirs, places) if with_optimizer else []
    report = Report(str(theirs.folder), str(out_dir), "megatron torch_dist")
    with WeightsWriter(Path(out_dir), iteration=theirs.iteration if with_optimizer else 0) as writer:
        for box in boxes:
            value = finite(_read(theirs, places[box.key], box), box.key, theirs.folder)
            writer.add(box.key, box.shape, box.offset, value)
        for state in states:
            for box in boxes:
                key = f"optimizer.state.{state}.{box.key}"
                if (place := theirs.find(key)) is not None:
                    writer.add(key, box.shape, box.offset, finite(_read(theirs, place, box), key, theirs.folder))
        train, step = TrainState(), None
        if with_optimizer:
            train, step = _counters(theirs, final)
        tokenizer = tokenizer_fingerprint(final)
        writer.complete(final, train.to_dict(), reason="imported", tokenizer=tokenizer, optimizer_step=step)
    _fill_report(theirs, places, states, report)
    return report


def _config(theirs: MegatronCheckpoint, recipe: ConfigContainer | None) -> ConfigContainer:
    """A finalized config with the architecture of the checkpoint, in the dtype of its weights."""
    if recipe is None:
        if not theirs.settings:
            raise ConversionError(
                f"{theirs.folder}: holds neither arguments of Megatron-LM nor a run_config.yaml. Name the model with "
                "--recipe."
            )
        cfg = pretrain_common()
        cfg.model = model_from_megatron(theirs.settings)
    else:
        cfg = recipe.copy()
    for name in ("tensor_model", "pipeline_model", "context", "expert_model"):
        setattr(cfg.model, f"{name}_parallel_size", 1)
    cfg.model.update(virtual_pipeline_model_parallel_size=None, expert_tensor_parallel_size=None)
    cfg.model.update(pipeline_model_parallel_layout="auto", sequence_parallel=False)
    cfg.precision.dtype = _dtype(theirs)
    final = cfg.finalize(None)
    if recipe is not None and theirs.settings:
        _check_recipe(final, theirs)
    return final


def _check_recipe(cfg: ConfigContainer, theirs: MegatronCheckpoint) -> None:
    """Raises ConversionError where a recipe says another architecture than the checkpoint."""
    said = pretrain_common()
    said.model = model_from_megatron(theirs.settings)
    model = said.finalize(None).model
    wrong = [
        f"model.{name}: the recipe has {getattr(cfg.model, name)!r}, the checkpoint {getattr(model, name)!r}."
        for name in ARCHITECTURE
        if name != "vocab_size" and getattr(cfg.model, name) != getattr(model, name)
    ]
    if wrong:
        raise ConversionError("\n".join(["The recipe does not match the checkpoint. Choose another recipe.", *wrong]))


def _dtype(theirs: MegatronCheckpoint) -> Literal["fp32", "bf16", "fp16"]:
    names: dict[torch.dtype, Literal["fp32", "bf16", "fp16"]] = {
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
    }
    weights = [key for key in theirs.stored.tensors if not key.startswith("optimizer.")]
    embedding = next((key for key in weights if VOCABULARY.fullmatch(key)), weights[0] if weights else None)
    if embedding is None:
        raise ConversionError(f"{theirs.folder}: holds no weights.")
    dtype = theirs.stored.dtype(embedding)
    if dtype not in names:
        raise ConversionError(f"{theirs.folder}: {embedding} is {dtype}; fp32, bf16 and fp16 weights are read.")
    return names[dtype]


def _places(theirs: MegatronCheckpoint, boxes: list[Box], cfg: ConfigContainer) -> dict[str, Place]:
    """Where each tensor of ours is; names, shapes and what is left over are checked."""
    places: dict[str, Place] = {}
    problems: list[str] = []
    for key, shape in {box.key: box.shape for box in boxes}.items():
        place = theirs.find(key)
        if place is None:
            problems.append(f"{key} is missing.")
            continue
        places[key] = place
        found = theirs.stored.shape(place.key)[0 if place.layer is None else 1 :]
        rows = cfg.model.vocab_size or 0
        is_padded = bool(VOCABULARY.fullmatch(key)) and found[1:] == shape[1:] and found[0] >= rows
        if found != shape and not is_padded:
            problems.append(f"{key} has shape {list(found)}, the model needs {list(shape)}.")
    weights = {key for key in theirs.stored.tensors if not key.startswith("optimizer.")}
    surplus = weights - {place.key for place in places.values()}
    problems += [f"{key} has no place in the model." for key in sorted(surplus) if "_extra_state" not in key]
    if problems:
        title = f"{theirs.folder}: nothing was written."
        raise ConversionError("\n".join([title, *problems[:_MOST_SHOWN]]))
    return places


def _states(theirs: MegatronCheckpoint, places: dict[str, Place]) -> list[str]:
    """Kinds of optimizer state that are stored by weight."""
    keys = [key for key in theirs.stored.tensors if key.startswith("optimizer.")]
    if not keys:
        raise ConversionError(f"{theirs.folder}: holds no optimizer state. Import it without --with-optimizer.")
    if odd := sorted(key for key in keys if OPTIMIZER_KEY.fullmatch(key) is None):
        raise ConversionError(
            f"{theirs.folder}: {odd[0]} is optimizer state in an order that depends on the layout. Resume the run once "
            "with --dist-ckpt-optim-fully-reshardable and save it, or import it without --with-optimizer."
        )
    found = sorted({match[1] for key in keys if (match := OPTIMIZER_KEY.fullmatch(key))})
    named = {place.key for state in found for key in places if (place := theirs.find(f"optimizer.state.{state}.{key}"))}
    if surplus := sorted(set(keys) - named):
        raise ConversionError(f"{theirs.folder}: {surplus[0]} belongs to no weight of the model.")
    return found


def _counters(theirs: MegatronCheckpoint, cfg: ConfigContainer) -> tuple[TrainState, int]:
    """Position of the run, and updates of its optimizer."""
    samples = theirs.consumed_samples
    if samples is None:
        raise ConversionError(
            f"{theirs.folder}: does not say how many samples were consumed, so a schedule cannot go on. Import it "
            "without --with-optimizer."
        )
    train = TrainState(
        iteration=theirs.iteration, consumed_samples=samples, consumed_tokens=samples * cfg.model.seq_length
    )
    step = theirs.optimizer_step
    return train, theirs.iteration if step is None else step


def _read(theirs: MegatronCheckpoint, place: Place, box: Box) -> Tensor:
    """One box of ours; rows of padding that they lack are zero, and rows that we lack are left out."""
    lead = () if place.layer is None else (place.layer,)
    ones = (1,) * len(lead)
    rows = theirs.stored.shape(place.key)[len(lead)] if box.size else 0
    if not VOCABULARY.fullmatch(box.key) or rows >= box.offset[0] + box.size[0]:
        return theirs.stored.read(place.key, (*lead, *box.offset), (*ones, *box.size)).reshape(box.size)
    value = torch.zeros(box.size, dtype=theirs.stored.dtype(place.key))
    count = max(0, min(box.size[0], rows - box.offset[0]))
    if count:
        value[:count] = theirs.stored.read(place.key, box.offset, (count, *box.size[1:]))
    return value


def _fill_report(theirs: MegatronCheckpoint, places: dict[str, Place], states: list[str], report: Report) -> None:
    report.read = sorted(place.key for place in places.values())
    report.written = sorted(places)
    extra = [key for key in theirs.stored.tensors if "_extra_state" in key]
    optimizer = [] if states else [key for key in theirs.stored.tensors if key.startswith("optimizer.")]
    report.left_out = [*extra, *optimizer, *_counts(theirs)]
    if states:
        report.notes.append(
            f"The optimizer's {', '.join(states)} and the counters of iteration {theirs.iteration} came along: resume "
            "with checkpoint.load. The data order is this project's own."
        )


def _counts(theirs: MegatronCheckpoint) -> Iterator[str]:
    for kind, count in theirs.stored.left_out.items():
        yield f"{count} of {kind}"
