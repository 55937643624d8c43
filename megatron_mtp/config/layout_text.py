"""Which layers each pipeline chunk holds: the grammar of layouts and the rules they must keep. Pure text and integers.

A chunk is a string of symbols in execution order: `E` embedding, `t` decoder layer, `m` MTP layer, `L` loss. Chunks are
listed in Megatron's order: the first chunk of every pipeline rank, then the second chunk of every rank, and so on, so
chunk `c` sits on rank `c % pp` as its virtual stage `c // pp`.

Source: megatron-core 0.19.2, transformer/pipeline_parallel_layer_layout.py. Rules it lacks and we add: no MTP on the
first rank, no empty chunk, no silent change of the virtual size.
"""

from __future__ import annotations

import re

SYMBOLS = {"E": "embedding", "t": "decoder layer", "m": "MTP layer", "L": "loss"}
EVEN = ("even", "auto", None)
MAX_REPEAT = 10_000
"""A larger repeat count is a typing mistake; expanding it would fill the memory."""


def expand_layout(text: str) -> list[str]:
    """Turns Megatron's layout string into chunks.

    `(xy)*n` and `x*n` repeat, `|` separates chunks, commas are cosmetic. Parentheses do not nest, as in Megatron.

    Example: "Et*2|(tt|)*2m|L" -> ["Ett", "tt", "tt", "m", "L"].

    Raises:
        ValueError: an unknown symbol, an unpaired parenthesis, or a repeat count above MAX_REPEAT.
    """
    flat = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        if any(int(count) > MAX_REPEAT for _, count in re.findall(pattern, flat)):
            raise ValueError(f"a part is repeated more than {MAX_REPEAT} times")
        flat = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), flat)
    if unknown := sorted(set(flat) - set(SYMBOLS) - {"|"}):
        known = ", ".join(f"{symbol} ({meaning})" for symbol, meaning in SYMBOLS.items())
        raise ValueError(f"unknown symbol {unknown[0]!r}; the symbols are {known}, | between chunks, and x*n or (xy)*n")
    return flat.split("|")


def even_chunks(num_layers: int, num_depths: int, num_chunks: int) -> list[str]:
    """Splits evenly, each MTP layer counted as one decoder layer of the last chunk.

    What does not divide goes to the chunks before the last: the last one also has the loss, and the first pipeline rank
    keeps the activations of most micro-batches in flight.

    Example: 4 layers and 2 depths on 2 chunks -> ["Ettt", "tmmL"]; 5 layers and 1 depth on 4 -> ["Et", "tt", "tt", "mL"].
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
) -> tuple[list[str], list[str]]:
    """Resolves a layout in any of its forms and checks it.

    Args:
        layout: "even", a list with the decoder layers of each chunk, or Megatron's string. "auto" and None are checked as "even": where that is
            legal, the planner finds a layout.
        num_layers: decoder layers of the trunk.
        num_depths: MTP layers.
        pp: pipeline size.
        vp: virtual pipeline size, 1 without interleaving.

    Returns:
        The pp * vp chunks, and the problems found; with problems the chunks may be incomplete.
    """
    name = f"model.pipeline_model_parallel_layout = {layout!r}"
    num_chunks = pp * vp
    if layout in EVEN:
        chunks = even_chunks(num_layers, num_depths, num_chunks)
        if num_layers < num_chunks and (chunks := sparse_chunks(num_layers, num_depths, pp, vp)) == []:
            return [], [_too_few_layers(num_layers, num_depths, pp, vp)]
    elif isinstance(layout, str):
        try:
            chunks = expand_layout(layout)
        except ValueError as error:
            return [], [f"{name}: {error}."]
    else:
        if problems := _list_problems(name, layout, num_layers, pp, vp):
            return [], problems
        chunks = with_ends(layout, num_depths)
    problems = _count_problems(name, chunks, pp, vp)
    problems += _content_problems(name, "".join(chunks), num_layers, num_depths)
    if not problems:
        problems = _placement_problems(name, chunks, num_depths, pp)
    return chunks, problems


def sparse_chunks(num_layers: int, num_depths: int, pp: int, vp: int) -> list[str]:
    """Fewer decoder layers than chunks: the loss, then the embedding, then the MTP layers get a chunk without any.

    Example: 3 layers and 1 depth on 4 chunks -> ["Et", "t", "t", "mL"]; on 3 ranks with 2 chunks each -> ["E", "t", "t", "t", "m", "L"].
    Empty if that is not enough.
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


def _too_few_layers(num_layers: int, num_depths: int, pp: int, vp: int) -> str:
    most = num_layers + 2
    size = next(size for size in range(min(pp, most), 0, -1) if size * vp <= most or size == 1)
    nearest = f"model.pipeline_model_parallel_size={size}"
    if vp > 1 and most // pp:
        nearest += f" or model.virtual_pipeline_model_parallel_size={most // pp}"
    chunks = "stage" if vp == 1 else "chunk"
    return (
        f"model.num_layers = {num_layers}: no {chunks} may be empty, and there are {pp * vp} "
        f"(model.pipeline_model_parallel_size = {pp} x model.virtual_pipeline_model_parallel_size = {vp}) for {num_layers} decoder "
        f"layers, embedding, loss{' and MTP layers' if num_depths else ''}. Use {nearest}, or more layers."
    )


def _list_problems(name: str, counts: list[int], num_layers: int, pp: int, vp: int) -> list[str]:
    problems = []
    if len(counts) != pp * vp:
        problems.append(
            f"{name} has {len(counts)} entries; it needs one for each of the {pp * vp} chunks "
            f"(pipeline size {pp} x virtual size {vp}). Add or remove entries, or use 'auto'."
        )
    if any(count < 0 for count in counts):
        problems.append(f"{name}: a chunk cannot hold a negative number of layers.")
    elif sum(counts) != num_layers:
        problems.append(
            f"{name} places {sum(counts)} decoder layers; model.num_layers = {num_layers}. MTP layers are not counted "
            "in the list. Make the sum equal, or use 'auto'."
        )
    return problems


def _count_problems(name: str, chunks: list[str], pp: int, vp: int) -> list[str]:
    if len(chunks) == pp * vp:
        return []
    if len(chunks) % pp:
        return [
            f"{name} has {len(chunks)} chunks, which model.pipeline_model_parallel_size = {pp} does not divide. "
            f"Write {pp * vp} chunks separated by |, or use 'auto'."
        ]
    return [
        f"{name} has {len(chunks)} chunks; model.pipeline_model_parallel_size = {pp} x "
        f"model.virtual_pipeline_model_parallel_size = {vp} makes {pp * vp}. Write {pp * vp} chunks, use 'auto', or set "
        f"model.virtual_pipeline_model_parallel_size = {len(chunks) // pp}."
    ]


def _content_problems(name: str, flat: str, num_layers: int, num_depths: int) -> list[str]:
    problems = []
    if flat.count("E") != 1 or not flat.startswith("E"):
        problems.append(f"{name}: the embedding E must stand first and once.")
    if flat.count("L") != 1 or not flat.endswith("L"):
        problems.append(f"{name}: the loss L must stand last and once.")
    if flat.count("t") != num_layers:
        problems.append(
            f"{name} has {flat.count('t')} decoder layers (t); model.num_layers = {num_layers}. "
            "Make them equal, or use 'auto'."
        )
    if flat.count("m") != num_depths:
        problems.append(
            f"{name} has {flat.count('m')} MTP layers (m); model.mtp_num_layers = {num_depths}. "
            "Make them equal, or use 'auto'."
        )
    if "m" in flat and "t" in flat[flat.index("m") :]:
        problems.append(
            f"{name}: a decoder layer (t) stands after an MTP layer (m); MTP layers come after all of them."
        )
    return problems


def _placement_problems(name: str, chunks: list[str], num_depths: int, pp: int) -> list[str]:
    problems = [
        f"{name}: chunk {idx + 1} is empty. Give it a layer, or use fewer chunks."
        for idx, chunk in enumerate(chunks)
        if not chunk
    ]
    holders = [idx for idx, chunk in enumerate(chunks) if "m" in chunk]
    if not holders:
        return problems
    if chunks[holders[0]].count("m") != num_depths:
        problems.append(f"{name}: all MTP layers (m) must be in one chunk.")
        return problems
    if holders[0] < len(chunks) - pp:
        problems.append(f"{name}: MTP layers (m) must be in the last virtual chunk of their pipeline rank.")
    if pp > 1 and holders[0] % pp == 0:
        problems.append(
            f"{name}: MTP layers (m) cannot be on the first pipeline rank, which holds the embedding in its first chunk. "
            "Move them to a later rank."
        )
    return problems
