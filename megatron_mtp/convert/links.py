"""Expands the tables of `names` for one model: which box of our tensors is made of which of theirs. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mtp.config.depths import MTP_BLOCK, Depths
from megatron_mtp.config.filled import filled
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.dimensions import features, sizes
from megatron_mtp.convert.hf_families import Family, find_family
from megatron_mtp.convert.names import (
    DELTA_NET,
    DENSE,
    EMBEDDING,
    EXPERTS,
    FINAL_NORM,
    GROUPED_ATTENTION,
    HEAD,
    LATENT_ATTENTION,
    Arrangement,
    Row,
    RowCut,
)
from megatron_mtp.errors import ConversionError
from megatron_mtp.parallel.params import linear_pattern, moe_pattern, mtp_dense_width, padded_vocab_size


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A tensor in Hugging Face files."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows start:stop of each of `groups` equal blocks of a tensor."""

    groups: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorLink:
    """A box of a tensor of ours, and the tensors of theirs that it is made of.

    Args:
        key: name in our checkpoints.
        shape: shape of the full tensor, with layer and expert axes.
        offset: where the box begins, per axis.
        size: size of the box, per axis.
        theirs: none for padding, which is zero.
        arrangement: how they make the box without its leading axes of length 1.
        rows: which rows of theirs, for arrangement `part`.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    theirs: tuple[HFTensor, ...]
    arrangement: Arrangement = "copy"
    rows: RowBlock | None = None


@dataclass(frozen=True, slots=True)
class Axes:
    """Place of one layer's tensors: key prefix, and leading axes that several layers share."""

    prefix: str
    lead: tuple[int, ...] = ()
    index: tuple[int, ...] = ()


def links(model: ModelConfig, family: str, num_depths: int | None = None) -> list[TensorLink]:
    """Every box of every tensor of `model`, in the order of the layers.

    Args:
        model: finalized; its parallel sizes affect the padding of the vocabulary only.
        num_depths: MTP depths to link; None: all that have weights of their own.

    Raises:
        ConversionError: the family's files cannot hold the MTP layers.
    """
    form = find_family(family)
    depths = Depths.of(model).distinct if num_depths is None else num_depths
    if depths:
        check_form(model, family, depths)
    found = list(_embedding("embedding.word_embeddings.weight", EMBEDDING, model))
    for layer_idx, (is_moe, is_linear) in enumerate(zip(moe_pattern(model), linear_pattern(model), strict=True)):
        prefix = f"model.layers.{layer_idx}."
        width = None if is_moe else model.ffn_hidden_size
        found += _layer(model, form, layer_axes(model, layer_idx), prefix, width, is_linear=is_linear)
    found.append(_vector("decoder.final_layernorm.weight", FINAL_NORM, model.hidden_size))
    for depth_idx in range(depths):
        found += _depth(model, form, depth_idx)
    if not model.share_embeddings_and_output_weights:
        found += _embedding("output_layer.weight", HEAD, model)
    return found


def new_depth_links(model: ModelConfig, family: str, depth_idx: int) -> list[tuple[TensorLink, bool]]:
    """The tensors of a new MTP depth, with the trunk's last layer and final norm as theirs.

    Returns:
        Each link, and whether it can be copied: input norms, projection, and a feed-forward block of another kind or
        width than the last layer's have no counterpart in the trunk.
    """
    if linear_pattern(model)[-1]:
        raise ConversionError(
            "model.linear_attention_freq: the trunk's last layer has linear attention, and an MTP layer has full "
            "attention. Use --mtp-init fresh."
        )
    ours, h = f"mtp.layers.{depth_idx}.", model.hidden_size
    none = HFTensor("", (h,))
    last = f"model.layers.{model.num_layers - 1}."
    width = mtp_dense_width(model)
    block = _layer(model, find_family(family), depth_axes(depth_idx), last, width)
    copies_mlp = width == (None if moe_pattern(model)[-1] else model.ffn_hidden_size)
    return [
        (TensorLink(f"{ours}enorm.weight", (h,), (0,), (h,), (none,)), False),
        (TensorLink(f"{ours}hnorm.weight", (h,), (0,), (h,), (none,)), False),
        (TensorLink(f"{ours}eh_proj.weight", (h, 2 * h), (0, 0), (h, 2 * h), (HFTensor("", (h, 2 * h)),)), False),
        *((link, copies_mlp or "mlp" not in link.key) for link in block),
        (_vector(f"{ours}final_layernorm.weight", FINAL_NORM, h), True),
    ]


def check_form(model: ModelConfig, family: str, depths: int) -> None:
    """Raises ConversionError if the family's files cannot hold these MTP layers."""
    form = find_family(family)
    without = "Convert without MTP layers (--mtp-depths 0), or train another variant."
    if model.mtp_variant != "sequential":
        raise ConversionError(
            f"model.mtp_variant = {model.mtp_variant!r}: files of {family} hold sequential MTP layers. {without}"
        )
    source = form.ours.get("mtp_hidden_source", "post_final_norm")
    if model.mtp_hidden_source != source:
        raise ConversionError(
            f"model.mtp_hidden_source = {model.mtp_hidden_source!r}: the MTP layers of {family} files are trained with "
            f"{source!r}. {without}"
        )
    most = form.mtp_form.max_depths
    if most is not None and depths > most:
        raise ConversionError(
            f"model.mtp_num_layers = {depths}: files of {family} hold {most} MTP layer, since depths share "
            f"one projection there. Export only the first with --mtp-depths {most}."
        )
    if model.num_moe_experts is None or not form.has_experts or form.mtp_form.is_ours:
        return
    if model.mtp_layer_mlp is not None:
        raise ConversionError(
            f"model.mtp_layer_mlp = {model.mtp_layer_mlp!r}: readers of {family} files expect experts in MTP layers, "
            f"and no key of config.json says otherwise. {without}"
        )
    kinds = moe_pattern(model)
    if not (kinds[-1] and (kinds[0] or form.dense_layers != "listed")):
        raise ConversionError(
            f"model.moe_layer_freq = {model.moe_layer_freq}: readers of {family} files expect experts in MTP layers "
            "unless a key names them as dense, and ours are like the trunk's last layer. So the last layer"
            f"{' and the first' if form.dense_layers == 'listed' else ''} must have experts. {without}"
        )


def duplicates(family: str, model: ModelConfig, num_depths: int) -> dict[str, str]:
    """Names in their files that repeat another tensor -> that tensor."""
    head = EMBEDDING if model.share_embeddings_and_output_weights else HEAD
    form = find_family(family).mtp_form
    return {
        form.prefix.format(n=model.num_layers + depth_idx, k=depth_idx) + name: head if of == HEAD else of
        for depth_idx in range(num_depths)
        for name, of in form.duplicates
    }


def layer_axes(model: ModelConfig, layer_idx: int) -> Axes:
    """Layers of one kind share tensors with a layer axis; with several kinds each layer has its own tensors.

    Source: megatron-core 0.19.2, TransformerBlock.sharded_state_dict; tests compare it with real models.
    """
    freq = model.moe_layer_freq if model.num_moe_experts is not None else 1
    if not isinstance(freq, int) or freq > 1 or model.experimental_attention_variant is not None:
        return Axes(f"decoder.layers.{layer_idx}.")
    return Axes("decoder.layers.", (model.num_layers,), (layer_idx,))


def depth_axes(depth_idx: int) -> Axes:
    """The transformer layer of an MTP depth."""
    return Axes(f"mtp.layers.{depth_idx}.{MTP_BLOCK}")


def _embedding(key: str, name: str, model: ModelConfig) -> Iterator[TensorLink]:
    rows, padded, h = filled(model.vocab_size), padded_vocab_size(model), model.hidden_size
    yield TensorLink(key, (padded, h), (0, 0), (rows, h), (HFTensor(name, (rows, h)),))
    if padded > rows:
        yield TensorLink(key, (padded, h), (rows, 0), (padded - rows, h), ())


def _vector(key: str, name: str, width: int) -> TensorLink:
    return TensorLink(key, (width,), (0,), (width,), (HFTensor(name, (width,)),))


def _depth(model: ModelConfig, family: Family, depth_idx: int) -> Iterator[TensorLink]:
    form = family.mtp_form
    place = {"n": model.num_layers + depth_idx, "k": depth_idx}
    prefix, ours, h = form.prefix.format(**place), f"mtp.layers.{depth_idx}.", model.hidden_size
    yield _vector(f"{ours}enorm.weight", prefix + form.enorm, h)
    yield _vector(f"{ours}hnorm.weight", prefix + form.hnorm, h)
    shape = (h, 2 * h)
    theirs = (HFTensor(prefix + form.projection, shape),)
    yield TensorLink(f"{ours}eh_proj.weight", shape, (0, 0), shape, theirs, form.projection_arrangement)
    block_prefix = form.block_prefix.format(**place)
    yield from _layer(model, family, depth_axes(depth_idx), block_prefix, mtp_dense_width(model))
    yield _vector(f"{ours}final_layernorm.weight", prefix + form.norm, h)


def _layer(
    model: ModelConfig, family: Family, axes: Axes, prefix: str, dense_width: int | None, *, is_linear: bool = False
) -> Iterator[TensorLink]:
    """A transformer layer; `dense_width` is that of its feed-forward block, None where it has experts."""
    grouped: tuple[Row, ...] = LATENT_ATTENTION if model.multi_latent_attention else GROUPED_ATTENTION
    attention = DELTA_NET if is_linear else grouped
    present, symbols = features(model), sizes(model) | {"ffn": dense_width or 0}
    for row in (*attention, *(EXPERTS if dense_width is None else DENSE)):
        if row.needs is None or row.needs in present:
            yield from _row(model, family, axes, prefix, row, symbols)


def _row(
    model: ModelConfig, family: Family, axes: Axes, prefix: str, row: Row, symbols: dict[str, int]
) -> Iterator[TensorLink]:
    shapes = [tuple(symbols[symbol] for symbol in shape.split()) for shape in row.shapes]
    of_expert = any("{e}" in name for name in row.theirs)
    num_experts = filled(model.num_moe_experts) if of_expert else 1
    for expert in range(num_experts):
        lead = axes.lead + ((num_experts,) if of_expert else ())
        index = axes.index + ((expert,) if of_expert else ())
        names = (prefix + family.name_of(name).replace("{e}", str(expert)) for name in row.theirs)
        theirs = tuple(HFTensor(name, shape) for name, shape in zip(names, shapes, strict=True))
        if row.cut is not None:
            yield _cut(axes.prefix + row.ours, theirs, row.cut, symbols)
            continue
        has_gate = row.arrangement == "by_group" and model.attention_output_gate
        arrangement = "by_group_gated" if has_gate else row.arrangement
        yield from _boxes(axes.prefix + row.ours, lead, index, theirs, arrangement)


def _cut(key: str, theirs: tuple[HFTensor, ...], cut: RowCut, symbols: dict[str, int]) -> TensorLink:
    """Layers with such tensors never share one, so there is no leading axis."""
    widths = [symbols[width] for width in cut.widths]
    start = sum(widths[: cut.index])
    rows = RowBlock(symbols[cut.groups], start, start + widths[cut.index])
    shape = (rows.groups * widths[cut.index], *theirs[0].shape[1:])
    return TensorLink(key, shape, (0,) * len(shape), shape, theirs, "part", rows)


def _boxes(
    key: str, lead: tuple[int, ...], index: tuple[int, ...], theirs: tuple[HFTensor, ...], arrangement: Arrangement
) -> Iterator[TensorLink]:
    """One box for all of theirs; for `stacked` one box for each."""
    rows = sum(tensor.shape[0] for tensor in theirs)
    inner = theirs[0].shape[1:]
    shape, ones = (*lead, rows, *inner), (1,) * len(lead)
    if arrangement != "stacked":
        yield TensorLink(key, shape, (*index, 0, *(0 for _ in inner)), (*ones, rows, *inner), theirs, arrangement)
        return
    first = 0
    for tensor in theirs:
        offset = (*index, first, *(0 for _ in inner))
        yield TensorLink(key, shape, offset, (*ones, *tensor.shape), (tensor,))
        first += tensor.shape[0]
