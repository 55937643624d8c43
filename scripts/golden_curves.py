"""Writes or checks the golden curves of tests/golden: twenty steps of small models at several layouts, in fp32.

    python scripts/golden_curves.py write [NAME ...]
    python scripts/golden_curves.py check [NAME ...]      # on the machine that wrote them: equal to the last bit

A file holds the command's fields and one line for each step. Every run goes through the command line, so the curves do
not depend on how the code is arranged. Bits differ between processors; `tests/golden` compares at the rounding of fp32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden"
COMMON = ("train.train_iters=20", "validation.eval_iters=2")
RUNS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "dense_1": ("tiny_dense", 1, ()),
    "dense_pp2_dp2": ("tiny_dense", 4, ("model.pipeline_model_parallel_size=2",)),
    "dense_vp2_z_loss": (
        "tiny_dense",
        2,
        (
            "model.pipeline_model_parallel_size=2",
            "model.virtual_pipeline_model_parallel_size=2",
            "train.micro_batch_size=1",
            "model.logits_z_loss_coeff=0.001",
            "model.mtp_depth_weights=[1.0,0.5]",
            "model.mtp_loss_scaling_factor='0.3@0,0.1@4096'",
        ),
    ),
    "dense_repeated": ("tiny_llama", 1, ("model.mtp_use_repeated_layer=True",)),
    "moe_1": ("tiny_moe", 1, ()),
    "moe_tp2_ep2": (
        "tiny_moe",
        2,
        (
            "model.tensor_model_parallel_size=2",
            "model.sequence_parallel=True",
            "model.expert_model_parallel_size=2",
            "model.expert_tensor_parallel_size=1",
            "model.moe_router_load_balancing_type=seq_aux_loss",
            "model.moe_aux_loss_coeff=0.001",
            "model.moe_z_loss_coeff=0.001",
        ),
    ),
    "mla_moe_1": ("tiny_mla_moe", 1, ()),
    "mla_moe_cp2_pp2": (
        "tiny_mla_moe",
        4,
        ("model.context_parallel_size=2", "model.pipeline_model_parallel_size=2"),
    ),
    "qwen3_next_1": ("tiny_qwen3_next", 1, ()),
}
COLUMNS = ("lm loss", "mtp_1 loss", "mtp_2 loss", "load_balancing_loss", "z_loss", "grad-norm")


def records(name: str) -> list[dict[str, Any]]:
    """Runs `name` in a fresh folder and returns its metrics."""
    recipe, nproc, overrides = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "megatron_mtp", "pretrain", recipe, "--nproc", str(nproc)]
        command += [*COMMON, *overrides, f"logger.log_dir={folder}"]
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def text_of(name: str) -> str:
    """The curve of `name` as it is kept: values by `repr`, so that equal text is equal to the last bit."""
    recipe, nproc, overrides = RUNS[name]
    found = [record for record in records(name) if record["kind"] in ("step", "evaluation")]
    columns = [column for column in COLUMNS if column in found[0]]
    lines = [f"# {recipe} on {nproc}: {' '.join([*COMMON, *overrides])}", f"# iteration, {', '.join(columns)}"]
    for record in found:
        values = [repr(record.get(column)) for column in columns]
        lines.append(" ".join([record["kind"], str(record["iteration"]), *values]))
    return "\n".join(lines) + "\n"


def main(action: str, *names: str) -> int:
    """Writes or checks; the number of curves that differ."""
    different = 0
    for name in names or RUNS:
        path, text = FOLDER / f"{name}.txt", text_of(name)
        if action == "write":
            path.write_text(text)
        elif path.read_text() != text:
            different += 1
            print(f"{name}: differs\n{text}")
        print(name, "written" if action == "write" else "compared", flush=True)
    return different


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
