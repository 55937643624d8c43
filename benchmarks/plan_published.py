"""Plans published runs and prints what is predicted beside what was published.

    python -m benchmarks.plan_published                 # each run, and how far both halves are off
    python -m benchmarks.plan_published --write docs    # docs/published_runs.md and its picture
    python -m benchmarks.plan_fit                       # fit the constants of config/machines.py again

published_runs.csv holds one row for each run with its source; tokens/s are those of one device. The newest release of
each run counts: sorted by id, rows with an even number, from 0, fit the constants, and the others judge them. Older
releases of the same run only serve to compare runs of one release with each other. Left out are runs in NVFP4 and with
Megatron-FSDP, which the planner does not know, runs with kernels that Megatron-Core 0.19 has not (grouped products with
fused activation, attention in FP8), and rows whose printed sizes contradict the release's own configuration files.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.machines import MACHINES
from megatron_mtp.config.units import GIB
from megatron_mtp.parallel.flops import train_flops_per_token
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner.assume import Assumptions
from megatron_mtp.parallel.planner.auto_layout import make_planner
from megatron_mtp.parallel.shape import RunShape
from megatron_mtp.recipes import get_recipe
from scripts.markdown import formatted

FIGURES = ("id", "release", "newest", "source", "tokens_per_s", "tflops", "mfu", "assumed")
"""Columns that say nothing about the run itself."""
TABLE = Path(__file__).with_name("published_runs.csv")
GPT = {"gated_linear_unit": False, "activation_func": "gelu", "normalization": "LayerNorm", "vocab_size": 51200}
NEMOTRON = {"gated_linear_unit": False, "activation_func": "squared_relu", "vocab_size": 256000}
LLAMA2 = {"vocab_size": 32000}


def _dense(layers: int, width: int, heads: int, groups: int, ffn: int, **more: Any) -> dict[str, Any]:
    sizes = {"num_layers": layers, "hidden_size": width, "num_attention_heads": heads, "num_query_groups": groups}
    return sizes | {"ffn_hidden_size": ffn, "kv_channels": None} | more


def _gpt(layers: int, width: int, heads: int, **more: Any) -> dict[str, Any]:
    return _dense(layers, width, heads, heads, 4 * width, **(GPT | more))


MODELS: dict[str, dict[str, Any]] = {
    "llama3_405b": _dense(126, 16384, 128, 8, 53248),
    "llama2_7b": _dense(32, 4096, 32, 32, 11008, **LLAMA2),
    "llama2_13b": _dense(40, 5120, 40, 40, 13824, **LLAMA2),
    "llama2_70b": _dense(80, 8192, 64, 8, 28672, **LLAMA2),
    "nemotron_8b": _dense(32, 4096, 32, 32, 16384, **NEMOTRON),
    "nemotron_22b": _dense(40, 6144, 48, 48, 24576, **NEMOTRON),
    "nemotron_340b": _dense(96, 18432, 96, 8, 73728, **NEMOTRON),
    "gpt3_5b": _gpt(24, 4096, 32),
    "gpt3_20b": _gpt(44, 6144, 48),
    "gpt3_175b": _gpt(96, 12288, 96),
    **{
        f"gpt_{name}": _gpt(layers, width, heads, vocab_size=131072)
        for name, layers, width, heads in (
            ("1.7b", 24, 2048, 16),
            ("7.1b", 30, 4096, 32),
            ("16b", 32, 6144, 48),
            ("32b", 48, 7168, 56),
            ("70b", 84, 8192, 64),
            ("119b", 92, 10240, 80),
            ("177b", 96, 12288, 96),
            ("314b", 96, 16384, 128),
            ("462b", 112, 18432, 144),
        )
    },
}
"""Models without a recipe, as changes of `llama3_8b`."""


@dataclass(frozen=True, slots=True)
class Run:
    """One row of the table."""

    row: dict[str, str]

    @property
    def id(self) -> str:
        """Model, device, precision, sizes and batch in short."""
        return self.row["id"]

    def number(self, name: str) -> int:
        """A column with an integer."""
        return int(self.row[name])

    @property
    def assume(self) -> Assumptions:
        """What the run had and this trainer has not."""
        row, precision = self.row, self.row["precision"]
        return Assumptions(
            fp8="none" if precision == "bf16" else precision,  # type: ignore[arg-type]  # the words of the table
            fp8_parameters=precision in ("tensorwise", "mxfp8"),
            # A graph of the router alone makes no difference that the published runs show.
            graphs="none" if row["graphs"] == "router" else row["graphs"],  # type: ignore[arg-type]  # as above
            dispatch=row["dispatch"] or "alltoall",  # type: ignore[arg-type]  # as above
            overlap_experts=row["overlap_experts"] == "1",
            overlap_tensor=row["overlap_tensor"] == "1",
        )

    def config(self) -> ConfigContainer:
        """The config of the run, finalized."""
        row, number = self.row, self.number
        cfg = get_recipe("llama3_8b" if row["model"] in MODELS else row["model"])
        model, modules = cfg.model, row["recompute"].split() or None
        model.update(**MODELS.get(row["model"], {}))
        model.update(
            mtp_num_layers=number("mtp"),
            seq_length=number("seq"),
            tensor_model_parallel_size=number("tp"),
            sequence_parallel=number("tp") > 1,
            pipeline_model_parallel_size=number("pp"),
            virtual_pipeline_model_parallel_size=number("vp"),
            pipeline_model_parallel_layout=row["layout"] or "even",
            context_parallel_size=number("cp"),
            expert_model_parallel_size=number("ep"),
            expert_tensor_parallel_size=1 if model.num_moe_experts else None,
            moe_grouped_gemm=True if model.num_moe_experts else None,
            recompute_granularity="selective" if modules else None,
            recompute_method=None,
            recompute_num_layers=None,
            recompute_modules=modules,
        )
        cfg.train.update(global_batch_size=number("batch"), micro_batch_size=number("micro"), rampup_batch_size=None)
        cfg.validation.update(eval_micro_batch_size=None, eval_global_batch_size=None)
        cfg.ddp.update(overlap_grad_reduce=True, overlap_param_gather=True)
        cfg.precision.grad_reduce_in_fp32 = not row["source"].startswith("Megatron")
        return cfg.finalize(number("gpus"))

    @property
    def is_newest(self) -> bool:
        """Whether no newer release has the same run."""
        return self.row["newest"] == "1"

    def published(self) -> float:
        """Tokens per second and device; from the MFU where nothing else was published."""
        if self.row["tokens_per_s"]:
            return float(self.row["tokens_per_s"])
        cfg = self.config()
        peak = MACHINES[self.row["device"]].peaks.bf16 or math.nan
        return float(self.row["mfu"]) / 100 * peak * 1e12 / train_flops_per_token(cfg.model)

    def predict(self) -> Prediction:
        """What the planner says."""
        cfg, machine = self.config(), MACHINES[self.row["device"]]
        planner = make_planner(RunShape.of(cfg, self.number("gpus")), machine, assume=self.assume)
        plan = planner.plan(PipelineLayout.of(cfg.model))
        return Prediction(self, self.published(), plan.tokens_per_s / self.number("gpus"), plan.peak_bytes / GIB)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A run beside its plan; tokens per second and device."""

    run: Run
    published: float
    predicted: float
    memory_gib: float

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.predicted / self.published - 1


REASONS = {
    "qwen3_30b_a3b-h100-16-tensorwise-tp1pp2vp24cp1ep8-512x2": (
        "Exchanges overlapped with computation, one layer in each chunk. Later releases run this model without the "
        "overlap and without pipeline stages, 1.7 times as fast (8,826): what the overlap costs is not understood."
    ),
    "llama3_405b-gb200-128-mxfp8-tp4pp8vp8cp2ep1-64x1": (
        "The first release, in which GB200 was slower than B200 (622) with the same sizes."
    ),
}
"""Why rows are far off, as far as their sources tell."""


def read_runs(*, newest: bool = True) -> list[Run]:
    """The runs that count, sorted by id, or all of them."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        runs = sorted(map(Run, csv.DictReader(file)), key=lambda run: run.id)
    return [run for run in runs if run.is_newest or not newest]


def predict_all(runs: Sequence[Run]) -> list[Prediction]:
    """Plans of runs; releases that differ in nothing but the published figure are planned once."""
    known: dict[tuple[str, ...], Prediction] = {}
    found = []
    for run in runs:
        key = tuple(value for name, value in run.row.items() if name not in FIGURES)
        one = known.setdefault(key, known.get(key) or run.predict())
        found.append(Prediction(run, run.published(), one.predicted, one.memory_gib))
    return found


def halves(items: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """(those that fit the constants, those that judge them) of items in the order of their ids."""
    return items[::2], items[1::2]


@dataclass(frozen=True, slots=True)
class Errors:
    """How far some predictions are off, as shares."""

    median: float
    within_20: float
    most: float

    @classmethod
    def of(cls, found: Sequence[Prediction]) -> Errors:
        """The errors of some predictions."""
        sizes = sorted(abs(one.error) for one in found)
        return cls(statistics.median(sizes), sum(size <= 0.2 for size in sizes) / len(sizes), sizes[-1])

    def __str__(self) -> str:
        return f"median {self.median:.1%}, within 20 %: {self.within_20:.1%}, largest {self.most:.1%}"


def ordered_pairs(found: Sequence[Prediction], *, same_release: bool = True) -> tuple[int, int]:
    """(pairs in the published order, all pairs) of runs of one model in one precision that differ in layout or device.

    Args:
        same_release: compare runs of one release only: the same run differs by up to 12 % from release to release.
    """
    names = ["model", "mtp", "seq", "precision", "source" if same_release else "model"]
    right = total = 0
    for a, b in combinations(found, 2):
        if any(a.run.row[name] != b.run.row[name] for name in names) or a.published == b.published:
            continue
        total += 1
        right += (a.published > b.published) == (a.predicted > b.predicted)
    return right, total


def lines(found: Sequence[Prediction]) -> list[str]:
    """The table of docs/published_runs.md."""
    rows = ["| run | half | source | published | predicted | off by | GiB |", "| -- | -- | -- | -- | -- | -- | -- |"]
    for number, one in enumerate(found):
        half = ("fit", "held out")[number % 2]
        source = one.run.row["source"].replace(
            "Megatron-Bridge 067f987d docs/performance-summary-archive.md,", "Bridge"
        )
        source = source.replace("NeMo 070a0bb1 docs/source/performance/performance_summary.md,", "").split(" README")[0]
        cells = (
            f"`{one.run.id}`",
            half,
            source.split(",")[0].strip(),
            f"{one.published:,.0f}",
            f"{one.predicted:,.0f}",
        )
        rows.append(f"| {' | '.join(cells)} | {one.error:+.1%} | {one.memory_gib:.0f} |")
    return rows


def page(found: Sequence[Prediction], everything: Sequence[Prediction]) -> str:
    """docs/published_runs.md."""
    fit, held = halves(found)
    right, total = ordered_pairs(everything)
    across, pairs = ordered_pairs(found, same_release=False)
    far = [f"- `{name}`: {text}" for name, text in REASONS.items()]
    text = [
        "# Published runs beside their plans",
        "",
        "Generated by `python -m benchmarks.plan_published --write docs`; do not edit. A test compares it.",
        "[The planning guide](planning.md#held-against-published-runs) says how the runs were chosen and what the",
        "planner assumes. Published and predicted are tokens per second and device; GiB is the predicted memory of",
        "the fullest stage. Sources and all sizes are in `benchmarks/published_runs.csv`.",
        "",
        f"- {len(fit)} runs that fitted the constants: {Errors.of(fit)}",
        f"- {len(held)} runs that were held out: {Errors.of(held)}",
        f"- order of pairs of one release, one model and one precision: {right} of {total} right ({right / total:.1%})",
        f"- the same across releases: {across} of {pairs} ({across / pairs:.1%})",
        "",
        "![Predicted over published tokens per second](published_runs.svg)",
        "",
        "Rows that are far off, and why as far as the sources tell:",
        "",
        *far,
        "",
        *lines(found),
    ]
    return formatted("\n".join(text) + "\n")


def picture(found: Sequence[Prediction]) -> str:
    """An SVG: predicted over published against published, one dot for each run."""
    width, height, left, base = 720, 360, 60, 320

    def x(rate: float) -> float:
        return left + (math.log10(rate) - 2) / 2.8 * (width - left - 20)

    def y(ratio: float) -> float:
        return base - (math.log2(ratio) + 0.75) / 1.5 * (base - 20)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for ratio in (0.6, 0.8, 1.0, 1.2, 1.5):
        dash = "" if ratio == 1 else ' stroke-dasharray="4"'
        parts.append(f'<path d="M{left} {y(ratio):.1f}H{width - 20}" stroke="#999"{dash}/>')
        parts.append(f'<text x="8" y="{y(ratio) + 4:.1f}" font-size="12">{ratio:.0%}</text>')
    for rate in (100, 1000, 10_000):
        parts.append(f'<text x="{x(rate):.1f}" y="{base + 18}" font-size="12">{rate:,}</text>')
    label = "published tokens per second and device; blue: held out, grey: fitted"
    parts.append(f'<text x="{left}" y="{height - 6}" font-size="12">{label}</text>')
    for number, one in enumerate(found):
        color, ratio = ("#aaaaaa", "#1f5fbf")[number % 2], min(1.66, max(0.6, one.predicted / one.published))
        title = f"<title>{one.run.id}: {one.error:+.1%}</title>"
        spot = f'cx="{x(one.published):.1f}" cy="{y(ratio):.1f}"'
        parts.append(f'<circle {spot} r="4" fill="{color}">{title}</circle>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Prints the table, or writes the page of the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="folder for published_runs.md and published_runs.svg")
    options = parser.parse_args()
    everything = predict_all(read_runs(newest=False))
    found = [one for one in everything if one.run.is_newest]
    text = page(found, everything)
    if options.write is None:
        print(text)
        return
    (options.write / "published_runs.md").write_text(text, encoding="utf-8")
    (options.write / "published_runs.svg").write_text(picture(found), encoding="utf-8")


if __name__ == "__main__":
    main()
