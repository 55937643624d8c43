"""Which layouts and masks the matrix holds, and which pairs of them run in `make test`."""

from __future__ import annotations

from megatron_mtp.verify.batches import MASKS

COMMON = (
    "pp=2",
    "pp=4",
    "pp=2,vp=2",
    "pp=4,layout=Ett|tt|mm|L",
    "cp=2",
    "cp=4",
    "dp=2",
    "dp=4",
    "dp=2,distopt=1",
    "dp=2,distopt=1,overlap=1",
    "tp=2,sp=1",
    "tp=2,sp=1,cp=2",
    "pp=2,cp=2",
)
# Megatron-Core trains experts under TP with sequence parallelism only; the config refuses the rest (test_refused.py).
LAYOUTS = {
    "dense": (*COMMON, "tp=2", "tp=2,pp=2", "tp=2,pp=2,dp=2"),
    "moe": (
        *COMMON,
        "ep=2",
        "pp=2,ep=2",
        "tp=2,sp=1,ep=2,etp=1",
        "tp=2,sp=1,ep=2,etp=2",
        "tp=2,sp=1,pp=2",
        "tp=2,sp=1,pp=2,dp=2",
    ),
}
LAYOUTS["dense_depths"] = LAYOUTS["mla_moe"] = LAYOUTS["moe"]
LAYOUTS["qwen3_next"] = tuple(layout.replace("|mm|", "|m|") for layout in LAYOUTS["moe"])  # one depth
# The layouts that some masks are made for.
MASK_OF = {
    "dp=2": "empty_dp_rank",
    "dp=4": "empty_dp_rank",
    "cp=2": "empty_cp_rank",
    "cp=4": "empty_cp_rank",
    "pp=2": "empty_micro_batch",
    "pp=4": "padded",
    "pp=2,vp=2": "documents",
    "pp=4,layout=Ett|tt|mm|L": "holes",
    "tp=2,sp=1,cp=2": "documents",
}
EIGHT_RANKS = ("tp=2,sp=1,pp=2,dp=2",)


def fast_pairs() -> set[tuple[str, str, str]]:
    """(model, layout, mask): every layout once on the dense and once on the MLA model, every mask on both."""
    masks = list(MASKS)
    pairs = set()
    for model in ("dense", "mla_moe"):
        for index, layout in enumerate(LAYOUTS[model]):
            if layout not in EIGHT_RANKS:  # the dense model runs a similar one
                pairs.add((model, layout, MASK_OF.get(layout, masks[index % len(masks)])))
    pairs |= {("dense_depths", "tp=2,sp=1,ep=2,etp=1", "holes"), ("dense_depths", "pp=2,ep=2", "padded")}
    return pairs | {("qwen3_next", "cp=2", "holes"), ("qwen3_next", "pp=4,layout=Ett|tt|m|L", "padded")}


def all_pairs() -> list[tuple[str, str, str]]:
    """(model, layout, mask) of the complete matrix."""
    return [
        (model, layout, mask)
        for model, layouts in LAYOUTS.items()
        for layout in layouts
        for mask in MASKS
        if (model, mask) != ("qwen3_next", "documents")  # refused: linear attention carries its state across documents
    ]
