"""Metric names, the console line, and the merge of several steps."""

from __future__ import annotations

import math
import re
from datetime import datetime

import pytest

from megatron_mtp.observe.console import evaluation_line, step_line
from megatron_mtp.observe.metrics import Interval, columns, scalars
from tests.observe.records import make_record

pytestmark = pytest.mark.unit

# The line that Megatron-Bridge's guide to MTP prints, field for field.
BRIDGE_LINE = (
    "iteration      100/  300000 | consumed samples:         3200 | elapsed time per iteration (ms): 3738.6 | "
    "learning rate: 6.000000E-05 | global batch size:    32 | lm loss: 7.968678E+00 | "
    "load_balancing_loss: 1.329517E+00 | mtp_1 loss: 7.925096E+00 | loss scale: 1.0 | grad norm: 1.040 | "
    "number of skipped iterations:   0 | number of nan iterations:   0 |"
)


def test_console_line_is_megatrons_to_the_character():
    unknown = {
        "num_zeros": None,
        "tokens_per_s_per_device": None,
        "tflops_per_device": None,
        "mfu": None,
    }
    line = step_line(make_record(**unknown), now=datetime(2026, 1, 2, 3, 4, 5))
    assert line == " [2026-01-02 03:04:05] " + BRIDGE_LINE


def test_throughput_comes_last_and_can_be_left_out():
    line = step_line(make_record())
    assert line.endswith("| tokens/s per device: 1234.5 | TFLOP/s per device: 312.25 | MFU: 0.3158 |")
    assert step_line(make_record(), throughput=False).endswith("number of nan iterations:   0 |")
    assert "MFU" not in step_line(make_record(mfu=None))


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_not_a_number_is_printed(value: float, text: str):
    losses = {"lm loss": value, "mtp_1 loss": value}
    line = step_line(make_record(losses=losses, grad_norm=value, loss_scale=value)).lower()
    for field in ("lm loss", "mtp_1 loss", "grad norm", "loss scale"):
        assert f"| {field}: {text} |" in line


def test_a_run_without_a_number_of_steps_has_a_line():
    assert re.search(r"iteration +5/ +- \|", step_line(make_record(5, train_iters=None)))


def test_every_value_of_the_line_has_a_name_in_the_sinks():
    record = make_record()
    values = scalars(record)
    for column in columns(record):
        assert values[column.name] == column.value(record), column.label
    assert values["consumed-tokens"] == record.consumed_tokens
    assert values["mtp_1 acceptance"] == 0.25
    assert "grad-norm" not in scalars(make_record(grad_norm=None))


def test_interval_merges_steps():
    interval = Interval()
    interval.add(
        make_record(1, losses={"lm loss": 4.0}, elapsed_ms=100.0, tokens_per_s_per_device=1000.0, skipped=1, mfu=None)
    )
    interval.add(
        make_record(2, losses={"lm loss": 2.0, "z_loss": 6.0}, elapsed_ms=300.0, tokens_per_s_per_device=200.0, nan=1)
    )
    for record, rate in zip(interval._records, (0.25, 0.75), strict=True):
        record.extra, record.metrics = {"mtp_1/accepted": rate}, {"a": rate}
    interval._records[0].metrics["b"] = 7.0  # a callback that returns it now and then
    merged = interval.drain()
    assert (merged.extra, merged.metrics) == ({"mtp_1/accepted": 0.5}, {"a": 0.5, "b": 7.0})
    assert merged.iteration == 2
    assert merged.losses == {"lm loss": 3.0, "z_loss": 6.0}
    assert merged.elapsed_ms == 200.0
    assert merged.tokens_per_s_per_device == pytest.approx((100 + 60) / 0.4)  # 160 tokens in 400 ms
    assert (merged.skipped, merged.nan) == (1, 1)
    interval.add(make_record(3, losses={"lm loss": 1.0}))
    assert interval.merged().losses == {"lm loss": 1.0}


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, -math.inf]])
def test_interval_keeps_a_nan(bad: list[float]):
    interval = Interval()
    for iteration, value in enumerate(bad, 1):
        interval.add(make_record(iteration, losses={"lm loss": value}))
    assert math.isnan(interval.drain().losses["lm loss"])


def test_evaluation_line():
    line = evaluation_line(
        "validation", 100, {"lm loss": math.log(8.0), "mtp_1 loss": 800.0}, {"mtp_1 acceptance": 0.5}
    )
    assert line == (
        " validation loss at iteration 100 | lm loss value: 2.079442E+00 | lm loss PPL: 8.000000E+00 | "
        "mtp_1 loss value: 8.000000E+02 | mtp_1 acceptance: 0.5 |"
    )
    assert "PPL: INF" in evaluation_line("test", 1, {"lm loss": 800.0}, {})
    assert "PPL: NAN" in evaluation_line("test", 1, {"lm loss": math.nan}, {})
