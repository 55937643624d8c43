"""Which layers each pipeline chunk holds: the grammar of layouts and the rules they must keep. Pure text and integers.

A chunk is a string of symbols in execution order: `E` embedding, `t` decoder layer, `m` MTP layer, `L` loss. Chunks are
listed in Megatron's order: the first chunk of every pipeline rank, then the second chunk of every rank, and so on, so
chunk `c` sits on rank `c % pp` as its virtual stage `c // pp`.

Source: megatron-core 0.19.2, transformer/pipeline_parallel_layer_layout.py. Rules it lacks and we add: no MTP on the
first rank, no empty chunk, no silent change of the virtual size.
"""

from __future__ import annotations

import re

from megatron_mtp.errors import Problem

SYMBOLS = {"E": "embedding", "t": "decoder layer", "m": "MTP layer", "L": "loss"}
EVEN = ("even", "auto", None)
FIELD = "model.pipeline_model_parallel_layout"
SIZES = ("model.pipeline_model_parallel_size", "model.virtual_pipeline_model_parallel_size")
MAX_REPEAT = 10_000
"""A larger repeat count, or an expanded layout of more than ten times as many symbols, is a typing mistake."""


def expand_layout(text: str) -> list[str]:
    """Turns Megatron's layout string into chunks.

    `(xy)*n` and `x*n` repeat, `|` separates chunks, commas are cosmetic. Parentheses do not nest, as in Megatron.

    Example: "Et*2|(tt|)*2m|L" -> ["Ett", "tt", "tt", "m", "L"].

    Raises:
        ValueError: an unknown symbol, an unpaired parenthesis, or a layout that is too long.
    """
    flat = text.replace(",", "")
    for pattern in (r"\(([^()]+)\)\*([0-9]+)", r"(.)\*([0-9]+)"):
        repeats = [(part, float(count)) for part, count in re.findall(pattern, flat)]
        if any(count > MAX_REPEAT for _, count in repeats):
            raise ValueError(f"a part is repeated more than {MAX_REPEAT} times")
        if sum(len(part) * count for part, count in repeats) > 10 * MAX_REPEAT:
            raise ValueError(f"it has more than {10 * MAX_REPEAT} symbols")
        flat = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), flat)
    if len(flat) > 10 * MAX_REPEAT:
        raise ValueError(f"it has more than {10 * MAX_REPEAT} symbols")
    if unknown := sorted(set(flat) - set(SYMBOLS) - {"|"}):
        known = ", ".join(f"{symbol} ({meaning})" for symbol, meaning in SYMBOLS.items())
        raise ValueError(f"unknown symbol {unknown[0]!r}; the symbols are {known}, | between chunks, and x*n or (xy)*n")
    return flat.split("|")


def even_chunks(num_layers: int, num_depths: int, num_chunks: int) -> list[str]:
    """Splits evenly, each MTP layer counted as one decoder layer of the last chunk.

    What does not divide goes to the chunks before the last: the last one also has the loss, and the first pipeline rank
    keeps the activations of most micro-batches in flight.

    Example: 4 layers and 2 depths on 2 chunks -> ["Ettt", "tmmL"]; 5 layers and 1 depth on 4 ->
    ["Et", "tt", "tt", "mL"].
    """
    if num_chunks == 1:
        return with_ends([num_layers], num_depths)
    last = max(0, (num_layers + num_depths) // num_chunks - num_depths)
    base, extra = divmod(num_layers - last, num_chunks - 1)
    counts = [base + (idx >= num_chunks - 1 - extra) for idx in range(num_chunks - 1)]
    return with_ends([*counts, last], num_depths)


def with_ends(decoder_counts: list[int], num_depths: int) -> list[str]:
    """Chunks with these numbers of decoder layers: embedding on the first, MTP and loss on the last.

    Example: [2, 1] with 1 depth -> ["Ett", "tmL"].
    """
    chunks = ["t" * count for count in decoder_counts]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "m" * num_depths + "L"
    return chunks


def layout_chunks(
    layout: str | list[int] | None, *, num_layers: int, num_depths: int, pp: int, vp: int
) -> tuple[list[str], list[Problem]]:
    """Resolves a layout in any of its forms and checks it.

    Args:
        layout: "even", a list with the decoder layers of each chunk, or Megatron's string. "auto" and None are checked
            as "even": where that is legal, the planner finds a layout.
        num_layers: decoder layers of the trunk.
        num_depths: MTP layers.
        pp: pipeline size.
        vp: virtual pipeline size, 1 without interleaving.

    Returns:
        The pp * vp chunks, and the problems found; with problems the chunks may be incomplete.
    """
    num_chunks = pp * vp
    if layout in EVEN:
        if num_layers >= num_chunks:
            chunks = even_chunks(num_layers, num_depths, num_chunks)
        elif not (chunks := sparse_chunks(num_layers, num_depths, pp, vp)):
            return [], [_too_few_layers(num_layers, num_depths, pp, vp)]
    elif isinstance(layout, str):
        try:
            chunks = expand_layout(layout)
        except ValueError as error:
            return [], [Problem(fields=(FIELD,), value=layout, rule=str(error))]
    else:
        if rules := _list_rules(layout, num_layers, pp, vp):
            return [], _problems(layout, rules)
        chunks = with_ends(layout, num_depths)
    rules = _count_rules(chunks, pp, vp) + _content_rules("".join(chunks), num_layers, num_depths)
    return chunks, _problems(layout, rules or _placement_rules(chunks, num_depths, pp))


def _problems(layout: str | list[int] | None, rules: list[tuple[str, str]]) -> list[Problem]:
    fields = (FIELD, "model.num_layers", "model.mtp_num_layers", *SIZES)
    return [Problem(fields=fields, value=layout, rule=rule, remedy=remedy) for rule, remedy in rules]


def sparse_chunks(num_layers: int, num_depths: int, pp: int, vp: int) -> list[str]:
    """Fewer decoder layers than chunks: the loss, then the embedding, then the MTP layers get a chunk without any.

    Example: 3 layers and 1 depth on 4 chunks -> ["Et", "t", "t", "mL"]; on 3 ranks with 2 chunks each ->
    ["E", "t", "t", "t", "m", "L"]. Empty if that is not enough.
    """
    missing = pp * vp - num_layers
    if missing <= 1:
        return with_ends([1] * num_layers + [0], num_depths)
    if missing == 2:
        return with_ends([0] + [1] * num_layers + [0], num_depths)
    # Not on the first rank, which with two ranks is the only other one.
    if missing == 3 and num_depths and pp > 2:
        return ["E", *["t"] * num_layers, "m" * num_depths, "L"]
    return []


def _too_few_layers(num_layers: int, num_depths: int, pp: int, vp: int) -> Problem:
    most = num_layers + 2
    size = next(size for size in range(min(pp, most), 0, -1) if size * vp <= most or size == 1)
    lower = f"{SIZES[0]}={size}"
    if vp > 1 and most // pp:
        lower += f" or {SIZES[1]}={most // pp}"
    chunks = "stage" if vp == 1 else "chunk"
    return Problem(
        fields=("model.num_layers", "model.mtp_num_layers", FIELD, *SIZES),
        value=num_layers,
        rule=f"no {chunks} may be empty, and there are {pp * vp} ({SIZES[0]} = {pp} x {SIZES[1]} = {vp}) for "
        f"{num_layers} decoder layers, embedding, loss{' and MTP layers' if num_depths else ''}",
        remedy=f"Use {lower}, or more layers.",
    )


def _list_rules(counts: list[int], num_layers: int, pp: int, vp: int) -> list[tuple[str, str]]:
    rules = []
    if len(counts) != pp * vp:
        sizes = f"pipeline size {pp} x virtual size {vp}"
        rule = f"has {len(counts)} entries; it needs one for each of the {pp * vp} chunks ({sizes})"
        rules.append((rule, "Add or remove entries, or use 'auto'."))
    if any(count < 0 for count in counts):
        rules.append(("a chunk cannot hold a negative number of layers", ""))
    elif sum(counts) != num_layers:
        rule = f"places {sum(counts)} decoder layers; model.num_layers = {num_layers}"
        rules.append((rule, "MTP layers are not counted in the list. Make the sum equal, or use 'auto'."))
    return rules


def _count_rules(chunks: list[str], pp: int, vp: int) -> list[tuple[str, str]]:
    if len(chunks) == pp * vp:
        return []
    if len(chunks) % pp:
        rule = f"has {len(chunks)} chunks, which {SIZES[0]} = {pp} does not divide"
        return [(rule, f"Write {pp * vp} chunks separated by |, or use 'auto'.")]
    rule = f"has {len(chunks)} chunks; {SIZES[0]} = {pp} x {SIZES[1]} = {vp} makes {pp * vp}"
    return [(rule, f"Write {pp * vp} chunks, use 'auto', or set {SIZES[1]} = {len(chunks) // pp}.")]


def _content_rules(flat: str, num_layers: int, num_depths: int) -> list[tuple[str, str]]:
    rules = []
    if flat.count("E") != 1 or not flat.startswith("E"):
        rules.append(("the embedding E must stand first and once", ""))
    if flat.count("L") != 1 or not flat.endswith("L"):
        rules.append(("the loss L must stand last and once", ""))
    remedy = "Make them equal, or use 'auto'."
    if flat.count("t") != num_layers:
        rules.append((f"has {flat.count('t')} decoder layers (t); model.num_layers = {num_layers}", remedy))
    if flat.count("m") != num_depths:
        rules.append((f"has {flat.count('m')} MTP layers (m); model.mtp_num_layers = {num_depths}", remedy))
    if "m" in flat and "t" in flat[flat.index("m") :]:
        rules.append(("a decoder layer (t) stands after an MTP layer (m); MTP layers come after all of them", ""))
    return rules


def _placement_rules(chunks: list[str], num_depths: int, pp: int) -> list[tuple[str, str]]:
    rules = [
        (f"chunk {idx + 1} is empty", "Give it a layer, or use fewer chunks.")
        for idx, chunk in enumerate(chunks)
        if not chunk
    ]
    holders = [idx for idx, chunk in enumerate(chunks) if "m" in chunk]
    if not holders:
        return rules
    if chunks[holders[0]].count("m") != num_depths:
        return [*rules, ("all MTP layers (m) must be in one chunk", "")]
    if holders[0] < len(chunks) - pp:
        rules.append(("MTP layers (m) must be in the last virtual chunk of their pipeline rank", ""))
    if pp > 1 and holders[0] % pp == 0:
        rule = "MTP layers (m) cannot be on the first pipeline rank, which holds the embedding in its first chunk"
        rules.append((rule, "Move them to a later rank."))
    return rules
