"""Routed experts without Transformer Engine, forward and backward: all together against one after the other.

    python -m benchmarks experts                    # three sizes, fp32, a minute on two cores
    python -m benchmarks experts --dtype bf16 --json experts.json

The sides are Megatron-Core's SequentialMLP, this package's default on a CPU, and the same with torch's grouped product.
They take turns on the same weights, tokens and routing, with gradients added to DDP's buffers as in a step.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import Timing, in_turn, machine, parser, write_results

SIZES = ((8, 2048, 512, 1536), (64, 4096, 512, 256), (128, 2048, 256, 128))
"""Experts, routed tokens, hidden size, width of an expert."""


def measure(
    experts: int, tokens: int, hidden: int, width: int, *, dtype: str, threads: int, rounds: int
) -> dict[str, Timing]:
    """Times of each side, which runs one layer's experts forward and backward."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_mtp.config.overrides import apply_overrides
    from megatron_mtp.model.torch_backend.experts import TorchExperts
    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.recipes import get_recipe
    from megatron_mtp.training.setup import setup

    cfg = get_recipe("tiny_moe")
    model = {
        "num_layers": 1,
        "mtp_num_layers": 0,
        "hidden_size": hidden,
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": width,
    }
    apply_overrides(cfg, [f"model.{name}={value}" for name, value in model.items()])
    apply_overrides(cfg, [f"precision.dtype={dtype}", "dist.device=cpu", "validation.eval_iters=0"])
    run = setup(resolve(cfg.finalize(1), 1))
    torch.set_num_threads(threads)
    (layer,) = (module for chunk in run.engine.chunks for module in chunk.modules() if isinstance(module, TorchExperts))
    generator = torch.Generator().manual_seed(0)
    kind = next(layer.parameters()).dtype
    x = torch.randn(tokens, hidden, generator=generator).to(kind).requires_grad_()
    upstream = torch.randn(tokens, hidden, generator=generator).to(kind)
    probs = torch.rand(tokens, generator=generator).requires_grad_()
    popularity = torch.rand(experts, generator=generator) + 0.2  # the busiest expert has about six times the fewest
    counts = torch.multinomial(popularity, tokens, replacement=True, generator=generator).bincount(minlength=experts)

    def side(call: Callable[..., Any], *, is_grouped: bool = False) -> Callable[[], None]:
        def once() -> None:
            layer.set_grouped(is_grouped)
            x.grad = probs.grad = None
            output, _ = call(layer, x, counts, probs)
            output.backward(upstream)

        return once

    calls = {
        "Megatron-Core": side(SequentialMLP.forward),
        "together": side(TorchExperts.forward),
        "grouped_mm": side(TorchExperts.forward, is_grouped=True),
    }
    timings = in_turn(calls, rounds)
    run.close()
    return timings


def main() -> None:
    """Prints a table and, with --json, writes all results."""
    options = _parse()
    warnings.filterwarnings("ignore")  # Megatron-Core's, about packages that none of the sides needs
    logging.getLogger("megatron").setLevel(logging.ERROR)
    described = machine(options.threads)
    print(f"{described['processor']}, {options.threads} threads, {options.dtype}; ms: median [interval]")
    results = []
    for size in SIZES[: options.sizes]:
        timings = measure(*size, dtype=options.dtype, threads=options.threads, rounds=options.rounds)
        base = timings["Megatron-Core"].median
        print("{} experts, {} tokens, h {}, width {}".format(*size))
        for name, timing in timings.items():
            interval = f"[{timing.low * 1e3:.1f}, {timing.high * 1e3:.1f}]"
            print(f"  {name:<14} {timing.median * 1e3:8.1f} {interval:<18} {base / timing.median:.2f}x", flush=True)
        results.append({"size": size, "timings": timings})
    write_results("experts", options, described, results)


def _parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    made.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes")
    return made.parse_args()


if __name__ == "__main__":
    main()
