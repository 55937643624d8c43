"""The table with which a run starts: what it trains, on which data, and what it plans."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_mtp.config.blend import set_label
from megatron_mtp.data.loader import DataModule
from megatron_mtp.data.uses import CorpusUse, repeats
from megatron_mtp.parallel.card import LABEL_WIDTH, WIDTH, Row, render, run_rows
from megatron_mtp.parallel.facts import short_count
from megatron_mtp.parallel.resolve import ResolvedRun
from megatron_mtp.training.setup import Run

logger = logging.getLogger(__name__)

MAX_PREFIXES = 24
"""Prefixes of one blend that are listed; the rest is summed up."""


def start_card(run: Run, recipe: str, iteration: int) -> str:
    """The table, at most `parallel.card.WIDTH` columns wide.

    Args:
        recipe: name for the records.
        iteration: training steps done before this process.
    """
    resolved, is_cpu = run.resolved, not run.device.is_cuda
    title = f"{recipe or 'this run'} on {resolved.world_size} x {run.device.name}"
    title += f", from iteration {iteration:,}" if iteration else ""
    uses = run.data.uses(resolved.order_samples)
    rows: list[Row] = [("run", title), *run_rows(resolved, is_cpu=is_cpu)]
    if resolved.phase_index:
        rows.insert(1, ("phase", resolved.phase.name))
    if (planned := resolved.planned) is not None and planned.machine.name not in run.device.name.lower():
        text = f"the layout is planned for {planned.machine.name}, and this device is {run.device.name}: set "
        rows.append(("note", f"{text}dist.hardware, or measure with `megatron-mtp profile` for `plan --profile`"))
    return render([*rows, ("data", _data_text(uses.pop("train"))), *_validation_rows(resolved, uses)])


def log_repeats(data: DataModule) -> None:
    """One line for each validation set that an evaluation goes round: its loss counts samples more than once."""
    for name, uses in data.uses(None).items():
        if text := repeats(set_label(name), uses):
            logger.info("%s", text)


def _data_text(uses: Sequence[CorpusUse]) -> str:
    if not uses:
        return "mock data, made from rng.seed"
    shown, rest = uses[:MAX_PREFIXES], uses[MAX_PREFIXES:]
    cells = [("prefix", "documents", "tokens", "weight", "epochs at the end")]
    cells += [(use.prefix, *_amounts([use]), "" if use.epochs is None else f"{use.epochs:.2f}") for use in shown]
    if rest:
        cells.append((f"{len(rest)} more prefixes", *_amounts(rest), ""))
    widths = [max(map(len, column)) for column in list(zip(*cells, strict=True))[1:]]
    room = WIDTH - LABEL_WIDTH - sum(widths) - 2 * len(widths)
    return "\n".join(
        "  ".join([f"{_tail(name, room):<{room}}", *(f"{cell:>{w}}" for cell, w in zip(amounts, widths, strict=True))])
        for name, *amounts in cells
    )


def _amounts(uses: Sequence[CorpusUse]) -> tuple[str, str, str]:
    documents, tokens = sum(use.num_documents for use in uses), sum(use.num_tokens for use in uses)
    return f"{documents:,}", short_count(tokens), f"{sum(use.share for use in uses):.1%}"


def _tail(text: str, room: int) -> str:
    """The end of a path, which tells more than its beginning."""
    return text if len(text) <= room else f"...{text[3 - room :]}"


def _validation_rows(run: ResolvedRun, sets: dict[str, list[CorpusUse]]) -> list[Row]:
    validation = run.cfg.validation
    if not sets:
        return [("validation", "none: the run has no validation set, or validation.eval_iters = 0")]
    if validation.reads_once:
        size = "each sample once"
    else:
        size = f"{validation.eval_iters:,} batches of {validation.eval_global_batch_size:,} samples from each set"
    when = f"every {validation.eval_interval:,} steps" if validation.eval_interval else "not during training"
    when += " and at the end" if validation.eval_at_end else ""
    rows = [("validation", f"{when}, {size}")]
    for name, uses in sets.items():
        label, samples = set_label(name), sum(use.num_samples for use in uses)
        if not uses:
            rows.append(("validation", f"{label}: mock data"))
            continue
        read = sum(use.num_samples * (use.epochs or 0.0) for use in uses) / samples
        tokens = short_count(sum(use.num_tokens for use in uses))
        rows.append(("validation", f"{label}: {samples:,} samples, {tokens} tokens; one evaluation reads {read:.1%}"))
    return rows
