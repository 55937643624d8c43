"""Peak resident memory of `convert import` and `convert export` on a model of several GB, against the documented bound.

    python benchmarks/convert_memory.py --folder runs/convert_memory [--fp8]

Makes a random dense model, imports, exports and checks it, each in a process of its own, and removes it. With --fp8 its
matrices are e4m3 with a scale for each block of 128 x 128, as in DeepSeek-V3's files, and become bf16.
The bound: the interpreter's own memory (after the imports) + twice the largest tensor + 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

GIB = 1 << 30
LAYERS, HIDDEN, FFN, HEADS, VOCAB = 16, 2048, 8192, 16, 32768

CHILD = """
import json, sys, time
from pathlib import Path
def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
from megatron_mtp.convert.importing import import_hf
from megatron_mtp.convert.exporting import export_hf
from megatron_mtp.convert.checking import check_hf
own, started = peak_bytes(), time.monotonic()
work = {"import": import_hf, "export": export_hf, "check": check_hf}[sys.argv[1]]
result = work(sys.argv[2], sys.argv[3])
same = result.is_equal if sys.argv[1] == "check" else None
print(json.dumps({"own": own, "peak": peak_bytes(), "seconds": time.monotonic() - started, "same": same}))
"""


def main() -> int:
    """Returns 0 if every bound holds and the bits are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="needs three times the model's size on the disk")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--fp8", action="store_true", help="matrices in FP8 with block scales")
    options = parser.parse_args()
    folder = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    try:
        total, largest = make_model(folder / "hf", options.layers, options.fp8)
        form = "fp8" if options.fp8 else "fp32"
        print(f"model: {total / 1e9:.2f} GB in {form}, largest tensor {largest / GIB:.2f} GiB", flush=True)
        steps = (("import", "hf", "checkpoint"), ("export", "checkpoint", "back"), ("check", "checkpoint", "back"))
        outcomes = [run(kind, folder / one, folder / two, largest) for kind, one, two in steps]
        return 0 if all(outcomes) else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_model(folder: Path, num_layers: int, is_fp8: bool) -> tuple[int, int]:
    """Writes random weights tensor by tensor; returns the bytes of all and of the largest as it is imported."""
    import torch

    from megatron_mtp.config import ConfigContainer
    from megatron_mtp.convert.hf_config import hf_config_dict
    from megatron_mtp.convert.links import links
    from megatron_mtp.convert.quantization import DEFAULT_BLOCK, SCALE_ENDING, scale_shape
    from megatron_mtp.convert.tensor_writer import Planned, TensorWriter
    from megatron_mtp.recipes.common import pretrain_common

    cfg: ConfigContainer = pretrain_common()
    cfg.model.update(num_layers=num_layers, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS)
    cfg.model.update(vocab_size=VOCAB, mtp_num_layers=0)
    cfg.finalize(None)
    folder.mkdir(parents=True)
    config = hf_config_dict(cfg.model, "llama")
    config |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}} if is_fp8 else {}
    (folder / "config.json").write_text(json.dumps(config))
    planned, dtype = [], torch.bfloat16 if is_fp8 else torch.float32
    for hf in (hf for link in links(cfg.model, "llama") for hf in link.theirs):
        in_blocks = is_fp8 and hf.name.startswith("model.layers.") and len(hf.shape) == 2
        planned.append(Planned(hf.name, torch.float8_e4m3fn if in_blocks else dtype, hf.shape))
        if in_blocks:
            planned.append(Planned(hf.name + SCALE_ENDING, torch.float32, scale_shape(hf.shape, DEFAULT_BLOCK)))
    writer = TensorWriter(folder, planned)
    for plan in planned:
        writer.write(plan.name, torch.randn(plan.shape).to(plan.dtype))
    writer.close()
    largest = max(torch.Size(plan.shape).numel() for plan in planned) * dtype.itemsize
    return sum(plan.num_bytes for plan in planned), largest


def run(kind: str, source: Path, target: Path, largest: int) -> bool:
    """One conversion in a process of its own; prints its memory and time."""
    arguments = [sys.executable, "-c", CHILD, kind, str(source), str(target)]
    started = time.monotonic()
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    bound = found["own"] + 2 * largest + GIB
    holds = found["peak"] <= bound and found["same"] is not False
    print(
        f"{kind}: peak {found['peak'] / GIB:.2f} GiB of {bound / GIB:.2f} allowed "
        f"(interpreter {found['own'] / GIB:.2f}), "
        f"{found['seconds']:.0f} s, {time.monotonic() - started:.0f} s with imports: {'holds' if holds else 'BROKEN'}"
    )
    return holds


if __name__ == "__main__":
    sys.exit(main())
