"""Expands the tables of `names` for one model: which box of which tensor of ours is made of which tensors of theirs.

Pure arithmetic; imports neither torch nor megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.dimensions import features, sizes
from megatron_mtp.convert.names import (
    DELTA_NET,
    DENSE,
    EMBEDDING,
    EXPERTS,
    FINAL_NORM,
    GROUPED_ATTENTION,
    HEAD,
    LATENT_ATTENTION,
    Layout,
    MTPForm,
    Part,
    Row,
    mtp_form,
    their_name,
)
from megatron_mtp.errors import ConversionError
from megatron_mtp.parallel.params import linear_pattern, moe_pattern, padded_vocab_size

MTP_BLOCK = "transformer_layer."
"""Megatron-Core saves an MTP layer's transformer layer under this name, whatever its module is called."""


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor in their files."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows start:stop of each of `groups` equal blocks of a source."""

    groups: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Link:
    """A box of a tensor of ours, and what it is made of.

    Args:
        key: in our checkpoints.
        whole: shape of the whole tensor, layer and expert axes included.
        offset: where the box begins.
        size: of the box, as many axes.
        sources: none for padding, which is zero.
        layout: how the sources make the box, the leading axes of length 1 left out.
        rows: of layout `part`.
    """

    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    sources: tuple[Source, ...]
    layout: Layout = "copy"
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class Axes:
    """Where the tensors of one layer lie: key prefix, and the leading axes that several layers share."""

    prefix: str
    lead: tuple[int, ...] = ()
    index: tuple[int, ...] = ()


def links(model: ModelConfig, family: str, num_depths: int | None = None) -> list[Link]:
    """Every box of every tensor of `model`, in the order of the layers.

    Args:
        model: finalized; its parallel sizes matter for the padding of the vocabulary only.
        num_depths: MTP depths to link; None: all that have weights of their own.

    Raises:
        ConversionError: the family's form has no place for the MTP layers.
    """
    form = mtp_form(family)
    depths = own_depths(model) if num_depths is None else num_depths
    if depths:
        check_form(model, family, depths)
    found = list(_embedding("embedding.word_embeddings.weight", EMBEDDING, model))
    for layer_idx, (is_moe, is_linear) in enumerate(zip(moe_pattern(model), linear_pattern(model), strict=True)):
        prefix = f"model.layers.{layer_idx}."
        found += _layer(model, family, layer_axes(model, layer_idx), prefix, is_moe, is_linear=is_linear)
    found.append(_vector("decoder.final_layernorm.weight", FINAL_NORM, model.hidden_size))
    for depth_idx in range(depths):
        found += _depth(model, family, form, depth_idx)
    if not model.share_embeddings_and_output_weights:
        found += _embedding("output_layer.weight", HEAD, model)
    return found


def grown_links(model: ModelConfig, family: str, depth_idx: int) -> list[tuple[Link, bool]]:
    """The tensors of a new MTP depth, with the trunk's last layer and final norm as sources.

    Returns:
        Each link, and whether its sources have its meaning: the norms of both inputs and the projection have no like.
    """
    if linear_pattern(model)[-1]:
        raise ConversionError(
            "model.linear_attention_freq: the trunk ends in a layer of linear attention, and an MTP layer has full attention. "
            "Take --mtp-init fresh."
        )
    ours, h = f"mtp.layers.{depth_idx}.", model.hidden_size
    none = Source("", (h,))
    last = f"model.layers.{model.num_layers - 1}."
    block = _layer(model, family, depth_axes(depth_idx), last, moe_pattern(model)[-1])
    return [
        (Link(f"{ours}enorm.weight", (h,), (0,), (h,), (none,)), False),
        (Link(f"{ours}hnorm.weight", (h,), (0,), (h,), (none,)), False),
        (Link(f"{ours}eh_proj.weight", (h, 2 * h), (0, 0), (h, 2 * h), (Source("", (h, 2 * h)),)), False),
        *((link, True) for link in block),
        (_vector(f"{ours}final_layernorm.weight", FINAL_NORM, h), True),
    ]


def own_depths(model: ModelConfig) -> int:
    """MTP layers that have weights: a repeated layer counts once."""
    return min(model.mtp_num_layers or 0, 1) if model.mtp_use_repeated_layer else model.mtp_num_layers or 0


def check_form(model: ModelConfig, family: str, depths: int) -> None:
    """Raises ConversionError if the family's files have no place for these MTP layers."""
    form = mtp_form(family)
    without = "Export without MTP layers (--mtp-depths 0), or train another form."
    if model.mtp_variant != "sequential":
        raise ConversionError(
            f"model.mtp_variant = {model.mtp_variant!r}: the files of {family} describe sequential MTP layers. {without}"
        )
    if model.mtp_hidden_source != "post_final_norm":
        raise ConversionError(
            f"model.mtp_hidden_source = {model.mtp_hidden_source!r}: readers of {family} files feed the hidden state after "
            f"the final norm. {without}"
        )
    if form.max_depths is not None and depths > form.max_depths:
        raise ConversionError(
            f"model.mtp_num_layers = {depths}: the form of {family} holds {form.max_depths} MTP layer, since depths share one "
            f"projection there. Export the first with --mtp-depths {form.max_depths}, and the others are left out by name."
        )


def duplicates(family: str, model: ModelConfig, num_depths: int) -> dict[str, str]:
    """Names in their files that repeat another tensor -> that tensor."""
    head = EMBEDDING if model.share_embeddings_and_output_weights else HEAD
    return {
        mtp_form(family).prefix.format(n=model.num_layers + depth_idx, k=depth_idx) + name: head if of == HEAD else of
        for depth_idx in range(num_depths)
        for name, of in mtp_form(family).duplicates
    }


def layer_axes(model: ModelConfig, layer_idx: int) -> Axes:
    """Layers of one kind lie in tensors with a layer axis, layers of several kinds each in tensors of its own.

    Source: megatron-core 0.19.2, TransformerBlock.sharded_state_dict; compared in tests with models that are built.
    """
    freq = model.moe_layer_freq if model.num_moe_experts is not None else 1
    if not isinstance(freq, int) or freq > 1 or model.experimental_attention_variant is not None:
        return Axes(f"decoder.layers.{layer_idx}.")
    return Axes("decoder.layers.", (model.num_layers,), (layer_idx,))


def depth_axes(depth_idx: int) -> Axes:
    """The transformer layer of an MTP depth."""
    return Axes(f"mtp.layers.{depth_idx}.{MTP_BLOCK}")


def _embedding(key: str, name: str, model: ModelConfig) -> Iterator[Link]:
    rows, padded, h = model.vocab_size or 0, padded_vocab_size(model), model.hidden_size
    yield Link(key, (padded, h), (0, 0), (rows, h), (Source(name, (rows, h)),))
    if padded > rows:
        yield Link(key, (padded, h), (rows, 0), (padded - rows, h), ())


def _vector(key: str, name: str, width: int) -> Link:
    return Link(key, (width,), (0,), (width,), (Source(name, (width,)),))


def _depth(model: ModelConfig, family: str, form: MTPForm, depth_idx: int) -> Iterator[Link]:
    place = {"n": model.num_layers + depth_idx, "k": depth_idx}
    prefix, ours, h = form.prefix.format(**place), f"mtp.layers.{depth_idx}.", model.hidden_size
    yield _vector(f"{ours}enorm.weight", prefix + form.enorm, h)
    yield _vector(f"{ours}hnorm.weight", prefix + form.hnorm, h)
    shape = (h, 2 * h)
    source = Source(prefix + form.projection, shape)
    yield Link(f"{ours}eh_proj.weight", shape, (0, 0), shape, (source,), form.projection_layout)
    block_prefix = form.block_prefix.format(**place)
    yield from _layer(model, family, depth_axes(depth_idx), block_prefix, moe_pattern(model)[-1])
    yield _vector(f"{ours}final_layernorm.weight", prefix + form.norm, h)


def _layer(
    model: ModelConfig, family: str, axes: Axes, prefix: str, is_moe: bool, *, is_linear: bool = False
) -> Iterator[Link]:
    attention = LATENT_ATTENTION if model.multi_latent_attention else GROUPED_ATTENTION
    if is_linear:
        attention = DELTA_NET
    present, symbols = features(model), sizes(model)
    for row in (*attention, *(EXPERTS if is_moe else DENSE)):
        if row.needs is None or row.needs in present:
            yield from _row(model, family, axes, prefix, row, symbols)


def _row(model: ModelConfig, family: str, axes: Axes, prefix: str, row: Row, symbols: dict[str, int]) -> Iterator[Link]:
    shapes = [tuple(symbols[symbol] for symbol in shape.split()) for shape in row.shapes]
    of_expert = any("{e}" in name for name in row.theirs)
    for expert in range(model.num_moe_experts or 0) if of_expert else (None,):
        lead = axes.lead + ((model.num_moe_experts,) if of_expert else ())
        index = axes.index + ((expert,) if of_expert else ())
        names = (prefix + their_name(family, name).replace("{e}", str(expert)) for name in row.theirs)
        sources = tuple(Source(name, shape) for name, shape in zip(names, shapes, strict=True))
        if row.part is not None:
            yield _part(axes.prefix + row.ours, sources, row.part, symbols)
            continue
        layout = "by_group_gated" if row.layout == "by_group" and model.attention_output_gate else row.layout
        yield from _boxes(axes.prefix + row.ours, lead, index, sources, layout)


def _part(key: str, sources: tuple[Source, ...], part: Part, symbols: dict[str, int]) -> Link:
    """Such layers never share a tensor, so there is no leading axis."""
    widths = [symbols[width] for width in part.widths]
    start = sum(widths[: part.index])
    rows = Rows(symbols[part.groups], start, start + widths[part.index])
    shape = (rows.groups * widths[part.index], *sources[0].shape[1:])
    return Link(key, shape, (0,) * len(shape), shape, sources, "part", rows)


def _boxes(
    key: str, lead: tuple[int, ...], index: tuple[int, ...], sources: tuple[Source, ...], layout: Layout
) -> Iterator[Link]:
    """One box for all sources, or for `stacked` one for each."""
    rows = sum(source.shape[0] for source in sources)
    inner = sources[0].shape[1:]
    whole, ones = (*lead, rows, *inner), (1,) * len(lead)
    if layout != "stacked":
        yield Link(key, whole, (*index, 0, *(0 for _ in inner)), (*ones, rows, *inner), sources, layout)
        return
    first = 0
    for source in sources:
        offset = (*index, first, *(0 for _ in inner))
        yield Link(key, whole, offset, (*ones, *source.shape), (source,))
        first += source.shape[0]
