"""The head alone: loss, top-1 and gradients of hidden states and weight, in time and memory.

    python -m benchmarks.head                          # n 2048, h 512, v 32768, fp32; about a minute on two cores
    python -m benchmarks.head --vocab 151936 --dtype bf16

Sides: this package (the gradient is made in the forward pass, three products); chunks of logits that are computed again
in the backward pass (four products); plain PyTorch (`linear` and `cross_entropy` on whole logits); and Liger's fused
kernel where it is installed and there is a GPU. Memory is what a side adds to the peak of a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.timing import in_turn_with_product, machine, parser, write_results
from megatron_mtp.objective.cross_entropy import VocabShard, chunked_cross_entropy
from megatron_mtp.parallel.shape import default_logits_chunk

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Head:
    """One head's inputs, and each side as a function without arguments that fills in the gradients."""

    def __init__(self, options: argparse.Namespace):
        torch.manual_seed(0)
        torch.set_num_threads(options.threads)
        dtype = DTYPES[options.dtype]
        self.hidden = torch.randn(options.tokens, options.hidden, dtype=dtype, requires_grad=True)
        self.weight = (torch.randn(options.vocab, options.hidden) * 0.02).to(dtype).requires_grad_()
        self.targets = torch.randint(options.vocab, (options.tokens,))
        self.weights = torch.full((options.tokens,), 1 / options.tokens)
        self.chunk = default_logits_chunk(options.tokens, {"fp32": 4, "bf16": 6}[options.dtype])

    def sides(self) -> dict[str, Callable[[], Tensor]]:
        """Name -> one forward and backward pass."""
        found = {"ours": self._ours, "logits again": self._again, "plain torch": self._plain}
        if importlib.util.find_spec("liger_kernel") and torch.cuda.is_available():
            found["liger"] = self._liger
        return {name: self._step(loss) for name, loss in found.items()}

    def _step(self, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def step() -> Tensor:
            self.hidden.grad = self.weight.grad = None
            found = loss()
            found.backward()
            return found.detach()

        return step

    def _ours(self) -> Tensor:
        shard = VocabShard.of(self.weight, len(self.weight), None)
        return chunked_cross_entropy(self.hidden, self.weight, self.targets, self.weights, shard, self.chunk).total

    def _again(self) -> Tensor:
        def part(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            logits = F.linear(hidden, self.weight).float()
            return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()

        parts = zip(*(x.split(self.chunk) for x in (self.hidden, self.targets, self.weights)), strict=True)
        return torch.stack([checkpoint(part, *each, use_reentrant=False) for each in parts]).sum()

    def _plain(self) -> Tensor:
        return F.cross_entropy(F.linear(self.hidden, self.weight).float(), self.targets)

    def _liger(self) -> Tensor:
        from liger_kernel.transformers import (  # type: ignore[import-not-found] # needs Triton
            LigerFusedLinearCrossEntropyLoss,
        )

        return LigerFusedLinearCrossEntropyLoss()(self.weight, self.hidden, self.targets)


def added_mib(name: str, options: argparse.Namespace) -> float:
    """What one pass of a side adds to the peak of memory, beside inputs and gradients."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_added, (name, options))


def _added(name: str, options: argparse.Namespace) -> float:
    head = Head(options)
    head.hidden.grad, head.weight.grad = torch.ones_like(head.hidden), torch.ones_like(head.weight)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # the library's own buffers
    step = head.sides()[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is in use now
    before = _status_kib("VmRSS")
    step()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Prints a table and, with --json, writes all results."""
    options = _parse()
    described = machine(options.threads)
    head = Head(options)
    sides = head.sides()
    gflop = 6e-9 * options.tokens * options.hidden * options.vocab
    size = DTYPES[options.dtype], options.tokens, options.hidden, options.vocab
    timings, speed = in_turn_with_product(sides, options.rounds, size)
    values = {name: float(step()) for name, step in sides.items()}
    memory = {name: added_mib(name, options) for name in sides}
    print(f"n {options.tokens}, h {options.hidden}, v {options.vocab}, {options.dtype}, chunk {head.chunk}")
    print("side             s [interval]               of ours   share   MiB     loss")
    for name, timing in timings.items():
        ratio, share = timing.median / timings["ours"].median, gflop / timing.median / speed
        print(f"{name:<16} {timing!s:<26} {ratio:7.2f} {share:7.1%} {memory[name]:5.0f} {values[name]:8.5f}")
    results = {"timings": timings, "added_mib": memory, "losses": values, "gflop": gflop, "product_gflops": speed}
    write_results("head", options, described, results)


def _parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=2048)
    made.add_argument("--hidden", type=int, default=512)
    made.add_argument("--vocab", type=int, default=32768)
    made.add_argument("--dtype", choices=DTYPES, default="fp32")
    return made.parse_args()


if __name__ == "__main__":
    main()
