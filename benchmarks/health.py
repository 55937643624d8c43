"""Healthy runs must raise no health sign: thirty of them, over three recipes.

    python -m benchmarks health              # thirty runs of 300 steps in two processes, about 10 minutes on two cores
    python -m benchmarks health --runs 3 --iters 60
    python -m benchmarks health --corpus stdlib --first-seed 1     # what signs may be tuned on

The runs that judge the signs use what was not used to tune them: other seeds and factors, and other text, the Python
sources of the installed torch package. The command ends with code 1 if any run reports a sign.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.timing import machine, parser, write_results
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.observe.jsonl import read_metrics

RECIPES = ("tiny_dense", "tiny_mla_moe", "tiny_mimo")
FACTORS = {
    "torch": (0.05, 0.15, 0.18, 0.25, 0.4, 0.08, 0.6, 0.12, 0.35, 0.8),
    "stdlib": (0.1, 0.3, 0.5, 1.0),
}
"""Loss factors by corpus."""
VOCAB_SIZE = 512


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run.

    Args:
        recipe, seed, factor: what it was.
        signs: what it reported, as text.
        main: mean main loss of its last ten steps.
        seconds: that it took.
    """

    recipe: str
    seed: int
    factor: float
    signs: list[str]
    main: float
    seconds: float


def main() -> int:
    """Prints a line for each run and returns the exit code."""
    options = _parse()
    described = machine(1)
    with tempfile.TemporaryDirectory(prefix="health-") as folder:
        data, factors = prepared(options.corpus, Path(folder) / "data"), FACTORS[options.corpus]
        kept = Path(options.keep or folder)
        jobs = [
            (
                RECIPES[i % 3],
                options.first_seed + i,
                factors[i // 3 % len(factors)],
                kept / f"run{i}",
                data,
                options.iters,
            )
            for i in range(options.runs)
        ]
        with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
            outcomes = []
            for outcome in pool.map(run, *zip(*jobs, strict=True)):
                print(_line(outcome), flush=True)
                outcomes.append(outcome)
    bad = sum(bool(outcome.signs) for outcome in outcomes)
    print(f"{len(outcomes)} healthy runs of {options.iters} steps, {bad} with a sign")
    write_results("health", options, described, [asdict(outcome) for outcome in outcomes])
    return 1 if bad else 0


def run(recipe: str, seed: int, factor: float, folder: Path, data: dict[str, str], iters: int) -> Outcome:
    """Trains one run in this process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from megatron_mtp import pretrain
    from megatron_mtp.recipes import get_recipe

    cfg = get_recipe(recipe)
    cfg.model.update(mtp_loss_scaling_factor=factor, num_layers=2)
    if cfg.model.moe_layer_freq is not None and cfg.model.num_moe_experts:
        cfg.model.update(moe_layer_freq=[0, 1], mtp_num_layers=1)
    cfg.rng.seed = seed
    cfg.train.update(train_iters=iters, global_batch_size=8, micro_batch_size=8)
    cfg.validation.update(eval_interval=50, eval_iters=2)
    cfg.scheduler.lr_warmup_iters = min(30, iters // 2)
    cfg.logger.update(log_dir=str(folder), log_interval=100, progress_bar=False)
    cfg.dist.update(device="cpu", num_threads=1)
    cfg.dataset.update(blend=None, mock=False, blend_per_split=[[data["train"]], [data["valid"]], None], split=None)
    cfg.dataset.path_to_cache = str(folder / "cache")
    cfg.tokenizer.update(tokenizer_type="huggingface", tokenizer_model=data["tokenizer"])
    began = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            pretrain(cfg)
        finally:
            sys.stdout = stdout
    path = folder / "metrics.jsonl"
    last = [step["lm loss"] for step in read_metrics(path)[-10:]]
    signs = [line["text"] for line in read_metrics(path, "warning")]
    return Outcome(recipe, seed, factor, signs, sum(last) / len(last), time.perf_counter() - began)


def prepared(corpus: str, folder: Path) -> dict[str, str]:
    """Prepares Python files: prefixes of training and held-out text, and the tokenizer.

    Args:
        corpus: `torch`, the installed package, or `stdlib`, Python's standard library without other packages.
    """
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent if corpus == "torch" else Path(sysconfig.get_path("stdlib"))
    texts: dict[str, list[str]] = {"train": [], "valid": []}
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.relative_to(root).parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        if text.strip() and digest % 100 < 20:  # a fifth is more than the runs read
            texts["valid" if digest % 100 < 2 else "train"].append(json.dumps({"text": text}))
    folder.mkdir(parents=True)
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    train = prepare([folder / "train.jsonl"], folder / "train", PrepareOptions(train_vocab_size=VOCAB_SIZE, shuffle=1))
    valid = prepare([folder / "valid.jsonl"], folder / "valid", PrepareOptions(tokenizer=train.tokenizer))
    return {"train": train.prefixes[0], "valid": valid.prefixes[0], "tokenizer": train.tokenizer}


def _line(outcome: Outcome) -> str:
    text = f"{outcome.recipe:<14} seed {outcome.seed} factor {outcome.factor:<5} main loss {outcome.main:.3f}"
    return f"{text} {outcome.seconds:5.0f} s  {'; '.join(outcome.signs) or 'no sign'}"


def _parse() -> argparse.Namespace:
    made = parser(__doc__, threads=1)
    made.add_argument("--runs", type=int, default=30)
    made.add_argument("--iters", type=int, default=300, help="steps of a run")
    made.add_argument("--corpus", choices=list(FACTORS), default="torch")
    made.add_argument("--first-seed", type=int, default=1000)
    made.add_argument("--keep", help="folder for the logs; they are removed without it")
    made.add_argument("--workers", type=int, default=2, help="processes")
    return made.parse_args()


if __name__ == "__main__":
    sys.exit(main())
