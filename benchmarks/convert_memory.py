"""Peak resident memory of `convert import` and `convert export` on a model of several GB, against the documented bound.

    python benchmarks/convert_memory.py --folder runs/convert_memory

Makes a random dense model, imports, exports and checks it, each in a process of its own, and removes it.
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
    options = parser.parse_args()
    folder = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    try:
        total, largest = make_model(folder / "hf", options.layers)
        print(f"model: {total / 1e9:.2f} GB in fp32, largest tensor {largest / GIB:.2f} GiB", flush=True)
        steps = (("import", "hf", "checkpoint"), ("export", "checkpoint", "back"), ("check", "checkpoint", "back"))
        outcomes = [run(kind, folder / one, folder / two, largest) for kind, one, two in steps]
        return 0 if all(outcomes) else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_model(folder: Path, num_layers: int) -> tuple[int, int]:
    """Writes random weights tensor by tensor; returns the bytes of all and of the largest."""
    import torch

    from megatron_mtp.config import ConfigContainer
    from megatron_mtp.convert.hf_config import hf_config_dict
    from megatron_mtp.convert.links import links
    from megatron_mtp.convert.tensor_files import Planned, TensorWriter
    from megatron_mtp.recipes.common import pretrain_common

    cfg: ConfigContainer = pretrain_common()
    cfg.model.update(num_layers=num_layers, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS)
    cfg.model.update(vocab_size=VOCAB, mtp_num_layers=0)
    cfg.finalize(None)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config_dict(cfg.model, "llama") | {"dtype": "float32"}))
    tensors = [hf for link in links(cfg.model, "llama") for hf in link.theirs]
    planned = [Planned(hf.name, torch.float32, hf.shape) for hf in tensors]
    writer = TensorWriter(folder, planned)
    for plan in planned:
        writer.write(plan.name, torch.randn(plan.shape))
    writer.close()
    return sum(plan.num_bytes for plan in planned), max(plan.num_bytes for plan in planned)


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
