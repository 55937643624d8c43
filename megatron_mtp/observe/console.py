"""Console lines of training steps and evaluations, in Megatron's format."""

from __future__ import annotations

import math
from datetime import datetime

from megatron_mtp.observe.metrics import StepRecord, columns


def step_line(record: StepRecord, throughput: bool = True, now: datetime | None = None) -> str:
    """The console line of one record.

    Args:
        record: one step, or several merged.
        throughput: whether to show tokens/s, TFLOP/s and MFU if they are known.
        now: the time stamp; None: the current time.

    Returns:
        ` [time] iteration  100/ 300000 | consumed samples: ... | ... | number of nan iterations: 0 | ...`
    """
    total = "-" if record.train_iters is None else record.train_iters
    fields = [f"iteration {record.iteration:8d}/{total:>8}"]
    fields += [text for column in columns(record, throughput) if (text := column.text(record)) is not None]
    return f" [{now or datetime.now():%Y-%m-%d %H:%M:%S}] " + " | ".join(fields) + " |"


def evaluation_line(name: str, iteration: int, losses: dict[str, float], metrics: dict[str, float]) -> str:
    """The console line of one evaluation.

    Args:
        name: `validation`, `test`, or the name of another validation set.
        iteration: training steps done before it.
        losses: nats per token, the main loss first.
        metrics: other metrics, such as acceptance rates.

    Returns:
        ` validation loss at iteration 100 | lm loss value: ... | lm loss PPL: ... | mtp_1 loss value: ... |`
    """
    fields = [f"{name} loss at iteration {iteration}"]
    for loss, value in losses.items():
        fields.append(f"{loss} value: {value:.6E}")
        if loss == "lm loss":
            fields.append(f"{loss} PPL: {perplexity(value):.6E}")
    fields += [f"{key}: {value:.6g}" for key, value in metrics.items()]
    return " " + " | ".join(fields) + " |"


def perplexity(loss: float) -> float:
    """exp(loss); infinite if it exceeds the range of a float."""
    return math.exp(loss) if loss < 700 or math.isnan(loss) else math.inf
