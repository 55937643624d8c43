"""From the command to the end of the first step, split by cause.

    python -m benchmarks.start      # nine starts of tiny_dense; about two minutes on two cores

Each start is a process of its own, with cached bytecode. The parts: the imports of the package, torch and
Megatron-Core, what builds the run, and the first step. Beside them stand `import megatron_mtp` alone and the help text.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time

from benchmarks.timing import Timing, machine, parser, write_results

LIMIT_S = 300
PARTS = ("to Python", "import megatron_mtp", "import torch", "import Megatron-Core and ours", "build the run", "step 1")
DRIVER = """
import json, sys, time
began = float(sys.argv[1])
marks = [time.time()]
import megatron_mtp
marks.append(time.time())
import torch
marks.append(time.time())
from megatron_mtp.recipes import get_recipe
from megatron_mtp.training.callbacks import Callback
from megatron_mtp.training.pretrain import pretrain
marks.append(time.time())

class Marks(Callback):
    def on_train_start(self, run, state): marks.append(time.time())
    def on_step_end(self, run, state, result): marks.append(time.time())

cfg = get_recipe("tiny_dense")
cfg.train.train_iters = 1
cfg.validation.eval_iters = 0
cfg.checkpoint.save = None
cfg.logger.log_dir = sys.argv[2]
cfg.dist.device = "cpu"
pretrain(cfg, callbacks=[Marks()])
print(json.dumps([b - a for a, b in zip([began, *marks], marks)]))
"""


def start(folder: str) -> list[float]:
    """Seconds of each part of one start."""
    command = [sys.executable, "-c", DRIVER, repr(time.time()), folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def seconds(*arguments: str) -> float:
    """Time of a Python process with these arguments."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, timeout=LIMIT_S, check=True)
    return time.perf_counter() - began


def main() -> None:
    """Prints a table and, with --json, writes all times."""
    options = parser(__doc__).parse_args()
    described = machine(options.threads)
    with tempfile.TemporaryDirectory(prefix="start-") as folder:
        start(folder)  # fills the bytecode cache
        starts = [start(folder) for _ in range(options.rounds)]
    found = {name: Timing.of([parts[index] for parts in starts]) for index, name in enumerate(PARTS)}
    found["all to the end of step 1"] = Timing.of([sum(parts) for parts in starts])
    empty = [seconds("-c", "pass") for _ in range(options.rounds)]
    imports = [seconds("-c", "import megatron_mtp") for _ in range(options.rounds)]
    found["import megatron_mtp, beside an empty process"] = Timing.of(
        [full - bare for full, bare in zip(imports, empty, strict=True)]
    )
    found["megatron-mtp --help"] = Timing.of([seconds("-m", "megatron_mtp", "--help") for _ in range(options.rounds)])
    for name, timing in found.items():
        print(f"{name:<46} {timing!s} s")
    write_results("start", options, described, found)


if __name__ == "__main__":
    main()
