"""What `mtp_finetune` gains: a demo model with one MTP layer drafts three tokens, before and after the fine-tuning.

    python -m benchmarks.finetune_drafter --folder runs/finetune

Steps, each kept in --folder and not repeated: the demo's data; a D=1 model trained on it; the model's own
continuations; the recipe mtp_finetune from that model's weights; acceptance by depth on held-out prompts with both,
decoded with three drafts a round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_mtp.examples.demo import DemoData, make_data

NUM_DRAFT = 3


def main() -> None:
    """Prints the table."""
    options = _parse()
    folder = Path(options.folder)
    data = make_data(folder / "data")
    base, tuned = folder / "base", folder / "tuned"
    if not (base / "checkpoints").exists():
        fields = {"model.mtp_num_layers": 1, "model.mtp_depth_weights": "null", "train.train_iters": options.iterations}
        pretrain("demo", ["--nproc", 2], base, data, fields | _text(data.train, data.valid))
    prefix = folder / "self/train"
    if not prefix.with_suffix(".idx").exists():
        continuations = ["--data", data_text(folder, "train"), "--out", prefix, "--tokenizer", data.tokenizer]
        run("megatron_mtp.drafting.continuations", base / "checkpoints", *continuations, "--threads", options.threads)
    if not (tuned / "checkpoints").exists():
        fields = {
            "checkpoint.pretrained_checkpoint": base / "checkpoints",
            "dataset.loss_mask_suffix": "_loss_mask",
            "dataset.blend": f"[{prefix}]",
            "dataset.split": "'95,5,0'",
            "validation.eval_iters": 4,
            "model.seq_length": 32 + 192 + 1,  # a sample is one continuation
            "dataset.reset_attention_mask": "true",
            "dataset.reset_position_ids": "true",
        }
        pretrain("mtp_finetune", [], tuned, data, fields)
    depths = "".join(f"{f'depth {k}':>10}" for k in range(1, NUM_DRAFT + 1))
    print(f"{'':8}{depths}{'tokens/pass':>13}{'speed-up':>10}")
    for name, checkpoints in (("before", base / "checkpoints"), ("after", tuned / "checkpoints")):
        result = spec_eval(checkpoints, data_text(folder, "valid"), data, folder / f"{name}.json", options)
        rates = "".join(f"{rate:10.1%}" for rate in result["acceptance"])
        print(f"{name:8}{rates}{result['tokens_per_pass']:13.2f}{result['speed_up']:10.2f}")


def data_text(folder: Path, part: str) -> Path:
    """JSONL of the demo's data."""
    return folder / f"data/text/stdlib_{part}.jsonl"


def _text(train: str, valid: str) -> dict[str, object]:
    return {"dataset.blend": "null", "dataset.split": "null", "dataset.blend_per_split": f"[[{train}],[{valid}],null]"}


def pretrain(recipe: str, launch: list[object], out: Path, data: DemoData, fields: dict[str, object]) -> None:
    """One run, into `out`."""
    fields = {
        "dataset.mock": "false",
        "dataset.path_to_cache": out / "cache",
        "tokenizer.tokenizer_type": "huggingface",
        "tokenizer.tokenizer_model": data.tokenizer,
        "checkpoint.save": out / "checkpoints",
        "logger.log_dir": out,
        "dist.device": "cpu",
    } | fields
    run("megatron_mtp", "pretrain", recipe, *launch, *(f"{name}={value}" for name, value in fields.items()))


def spec_eval(checkpoints: Path, text: Path, data: DemoData, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Acceptance and speed over all held-out prompts."""
    run(
        "megatron_mtp", "spec-eval", checkpoints, "--data", text,
        "--tokenizer", data.tokenizer, "--num-draft", NUM_DRAFT,
        "--prompts", options.prompts, "--prompt-tokens", 32, "--new-tokens", 128, "--threads", options.threads,
        "--device", "cpu", "--json", out,
    )  # fmt: skip
    return json.loads(out.read_text())["domains"][-1]


def run(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    print("$ python", " ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/finetune")
    parser.add_argument("--iterations", type=int, default=500, help="of the D=1 model")
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
