"""Names and rates of what a step or an evaluation found, for the records."""

from __future__ import annotations

from torch import Tensor

from megatron_mtp.objective.acceptance import ROWS


def loss_names(num_depths: int) -> list[str]:
    """Names of the losses of depths 0..D as the ecosystem writes them."""
    return ["lm loss", *(f"mtp_{depth} loss" for depth in range(1, num_depths + 1))]


def named_losses(losses: list[float], router: dict[str, float]) -> dict[str, float]:
    """All losses in console order: the main one, the routers', then one for each depth."""
    names = loss_names(len(losses) - 1)
    routers = {name.removeprefix("seq_"): value for name, value in router.items()}
    return {names[0]: losses[0], **routers, **dict(zip(names[1:], losses[1:], strict=True))}


def acceptance_rates(counts: Tensor) -> dict[str, float]:
    """Rates of each depth from counts [rows, 1+D].

    mtp_k/top1_target: the depth's top-1 is the target. mtp_k/top1_main: it is the main prediction's top-1 for that token.
    mtp_k/accepted: the same, given that depths 1..k-1 agreed, as a drafter would be accepted. mtp/accepted_length: expected number of drafted tokens
    accepted in a row. A rate without a single slot is left out.
    """
    rows = dict(zip(ROWS, counts.tolist(), strict=True))
    figures: dict[str, float] = {}
    if rows["valid"][0]:
        figures["lm/top1_target"] = rows["label_hits"][0] / rows["valid"][0]
    length, reach = 0.0, 1.0
    for depth in range(1, counts.shape[1]):
        if rows["valid"][depth]:
            figures[f"mtp_{depth}/top1_target"] = rows["label_hits"][depth] / rows["valid"][depth]
            figures[f"mtp_{depth}/top1_main"] = rows["main_hits"][depth] / rows["valid"][depth]
        rate = rows["chain_hits"][depth] / rows["chain_valid"][depth] if rows["chain_valid"][depth] else 0.0
        if rows["chain_valid"][depth]:
            figures[f"mtp_{depth}/accepted"] = rate
        reach *= rate
        length += reach
    if counts.shape[1] > 1:
        figures["mtp/accepted_length"] = length
    return figures


def acceptance_by_depth(counts: Tensor) -> dict[str, list[int]]:
    """Counts [rows, 1+D] as the train state keeps them: row name -> one integer for each of the depths 1..D."""
    return {name: row[1:] for name, row in zip(ROWS, counts.tolist(), strict=True)}
