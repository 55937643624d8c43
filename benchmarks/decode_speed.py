"""Plain decoding against transformers on the same export, and drafting against plain decoding, all in one process.

    python -m benchmarks.decode_speed      # the first run of `make demo`, on its held-out text

Each prompt is decoded greedily by transformers (dynamic cache, `generate`), by this package without drafts, and with 1,
2, 3 drafts and the automatic number; batch 1. Runs of one prompt follow each other, so that all meet the same machine,
and medians over prompts are printed. transformers is left out with --no-transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_mtp.decode.speculate import Options, generate
from megatron_mtp.drafting.decoder import LoadedModel, open_decoder
from megatron_mtp.drafting.spec_eval import read_domains


def main() -> None:
    """Prints a table and, with --json, writes all results."""
    options = _parse()
    with tempfile.TemporaryDirectory() as folder:
        reference = None if options.no_transformers else _transformers(options, Path(folder))
        with open_decoder(options.source, threads=options.threads, tokenizer=options.tokenizer) as loaded:
            torch.set_num_threads(options.threads)
            results = measure(loaded, reference, options)
    _print(results)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


def measure(loaded: LoadedModel, reference: Any | None, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """name -> seconds per token of each prompt, tokens per pass, and whether the tokens equal plain decoding's."""
    documents = next(iter(read_domains([options.data], loaded.encode, options.prompts).values()))
    prompts = [ids[: options.prompt_tokens] for ids in documents if len(ids) > options.prompt_tokens][: options.prompts]
    cells: dict[str, int | str] = {"plain": 0} | {f"K={k}": k for k in options.drafts} | {"auto": "auto"}
    if not loaded.decoder.depths:
        cells = {"plain": 0}
    results: dict[str, dict[str, Any]] = {
        name: {"ms_per_token": [], "tokens_per_pass": [], "equal": 0} for name in cells
    }
    if reference is not None:
        results["transformers"] = {"ms_per_token": [], "tokens_per_pass": [1.0], "equal": 0}
    for index, prompt in enumerate([prompts[0], *prompts]):  # the first one warms up
        plain = None
        for name, num_draft in cells.items():
            out = generate(loaded.decoder, [prompt], Options(max_new_tokens=options.new_tokens, num_draft=num_draft))
            plain = plain or out.tokens[0]
            if index:
                results[name]["ms_per_token"].append(1e3 * out.decode_s / out.counts.new_tokens)
                results[name]["tokens_per_pass"].append(out.counts.tokens_per_pass)
                results[name]["equal"] += out.tokens[0] == plain
        if reference is not None:
            seconds, tokens = _time_transformers(reference, prompt, options.new_tokens)
            if index:
                results["transformers"]["ms_per_token"].append(1e3 * seconds / (options.new_tokens - 1))
                results["transformers"]["equal"] += tokens == plain
    return results


def _transformers(options: argparse.Namespace, folder: Path) -> Any:
    """The export, loaded by transformers with its own defaults (SDPA attention), in fp32."""
    from transformers import AutoModelForCausalLM

    from megatron_mtp.convert.exporting import export_hf
    from megatron_mtp.convert.load import is_hf_folder

    source = options.source
    if not is_hf_folder(source):
        source = folder / "hf"
        export_hf(options.source, source, mtp_depths=0, with_tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def _time_transformers(model: Any, prompt: list[int], new_tokens: int) -> tuple[float, list[int]]:
    """Seconds of all tokens but the first, and the tokens. The prefill is timed by itself and subtracted."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **settings)
    first = time.perf_counter()
    out = model.generate(ids, max_new_tokens=new_tokens, **settings)
    elapsed = time.perf_counter() - first
    return elapsed - (first - started), out[0, len(prompt) :].tolist()


def _print(results: dict[str, dict[str, Any]]) -> None:
    plain = results["plain"]["ms_per_token"]
    print(f"{'':14}{'ms/token':>10}{'tokens/s':>10}{'vs plain':>10}{'tokens/pass':>13}{'same tokens':>13}")
    for name, cell in results.items():
        times = cell["ms_per_token"]
        ratio = statistics.median(p / t for p, t in zip(plain, times, strict=True))
        median = statistics.median(times)
        per_pass = statistics.mean(cell["tokens_per_pass"])
        print(f"{name:14}{median:10.3f}{1e3 / median:10.1f}{ratio:10.2f}{per_pass:13.2f}{cell['equal']:8}/{len(times)}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = Path("runs/demo")
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        default=demo / "run_001" / "checkpoints",
        help="run directory, checkpoint or Hugging Face folder; default: %(default)s",
    )
    data = demo / "data" / "text" / "stdlib_valid.jsonl"
    parser.add_argument("--data", default=str(data), help=".jsonl or text file with prompts; default: %(default)s")
    parser.add_argument("--tokenizer", help="in place of the model's")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--drafts", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
