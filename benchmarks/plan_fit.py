"""Fits the constants of config/machines.py to the first half of the published runs, one constant after another.

    python -m benchmarks.plan_fit --seconds 120

It prints the constants, and how far both halves are off with them. See plan_published.py for the halves.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.plan_published import Errors, Prediction, Run, halves, read_runs
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.machines import MACHINES, Machine
from megatron_mtp.parallel.layout import PipelineLayout
from megatron_mtp.parallel.planner import assume as assumptions
from megatron_mtp.parallel.planner.auto_layout import make_planner
from megatron_mtp.parallel.shape import RunShape

FRACTIONS = ("matmul_fraction", "fp8_fraction", "expert_fraction", "fp8_expert_fraction", "attention_fraction")
SHARED = (
    *("memory_fraction", "link_fraction", "overlapped_share", "host_ms", "host_expert_factor", "host_fp8_factor"),
    *("host_graph_share", "host_overlap_factor", "narrow_width"),
)
AT_MOST = dict.fromkeys((*FRACTIONS, "memory_fraction", "link_fraction", "overlapped_share", "host_graph_share"), 1.0)
CLIPPED = 0.35
"""Errors above it, as logarithms, count less: some rows are far off for reasons that no constant knows."""
Constants = dict[str, float]


def family(device: str) -> str:
    """The devices that share their fractions."""
    return "hopper" if device.startswith("h") else "blackwell"


def start() -> Constants:
    """The constants as they are."""
    hopper, blackwell, ultra = (MACHINES[name] for name in ("h100", "gb200", "gb300"))
    found = {f"hopper {name}": getattr(hopper, name) for name in FRACTIONS}
    found |= {f"blackwell {name}": getattr(blackwell, name) for name in FRACTIONS}
    found["ultra"] = ultra.matmul_fraction / blackwell.matmul_fraction
    found |= {name: getattr(hopper, name) for name in SHARED}
    return found | {"mxfp8 speed": assumptions.MXFP8_SPEED}


def machine(device: str, constants: Constants) -> Machine:
    """A device with these constants."""
    faster = constants["ultra"] if device in ("b300", "gb300") else 1.0
    fractions = {name: min(1.0, faster * constants[f"{family(device)} {name}"]) for name in FRACTIONS}
    changes: dict[str, Any] = fractions | {name: constants[name] for name in SHARED}
    return replace(MACHINES[device], **changes)


class Fit:
    """Errors of runs as functions of the constants."""

    def __init__(self, runs: Sequence[Run]):
        self.runs, self.first = runs, start()
        self.prepared: list[tuple[ConfigContainer, RunShape, PipelineLayout]] = []
        for run in runs:
            cfg = run.config()
            self.prepared.append((cfg, RunShape.of(cfg, run.number("gpus")), PipelineLayout.of(cfg.model)))

    def predict(self, constants: Constants) -> list[Prediction]:
        """All runs with these constants; memory is left out."""
        recipe = assumptions.FP8_RECIPES["mxfp8"]._replace(speed=constants["mxfp8 speed"])
        assumptions.FP8_RECIPES["mxfp8"] = recipe
        found = []
        for run, (cfg, shape, layout) in zip(self.runs, self.prepared, strict=True):
            step = make_planner(shape, machine(run.row["device"], constants), assume=run.assume).step(layout)
            tokens = cfg.train.global_batch_size * cfg.model.seq_length / shape.world_size
            found.append(Prediction(run, run.published(), tokens / step.total_ms * 1e3, 0.0))
        return found

    def loss(self, constants: Constants) -> float:
        """Mean of the clipped errors, and a little for each constant that moves away from where it was."""
        sizes = [abs(math.log(one.predicted / one.published)) for one in self.predict(constants)]
        clipped = sum(size if size < CLIPPED else CLIPPED + 0.3 * (size - CLIPPED) for size in sizes) / len(sizes)
        return clipped + 0.002 * sum(math.log(value / self.first[name]) ** 2 for name, value in constants.items())

    def run(self, seconds: float) -> Constants:
        """Moves one constant after another as long as that helps."""
        best, constants = self.loss(self.first), dict(self.first)
        steps, end = dict.fromkeys(constants, 1.15), time.monotonic() + seconds
        while time.monotonic() < end and max(steps.values()) > 1.01:
            for name in constants:
                moved = False
                for factor in (steps[name], 1 / steps[name]):
                    most = AT_MOST.get(name.split()[-1], math.inf)
                    trial = constants | {name: min(most, constants[name] * factor)}
                    if (loss := self.loss(trial)) < best - 1e-6:
                        best, constants, moved = loss, trial, True
                        break
                steps[name] = min(1.5, steps[name] * 1.3) if moved else 1 + (steps[name] - 1) / 2
        return constants


def main() -> None:
    """Prints the constants and the errors of both halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    fitted, held = halves(read_runs())
    constants = Fit(fitted).run(options.seconds)
    for name, value in constants.items():
        print(f"{name:32} {value:.3f}")
    print("fit:     ", Errors.of(Fit(fitted).predict(constants)))
    print("held out:", Errors.of(Fit(held).predict(constants)))


if __name__ == "__main__":
    main()
