"""Kills a training run again and again, and compares its result with that of a run that was never stopped.

    python benchmarks/kill_test.py                  # 25 kills of one rank
    python benchmarks/kill_test.py --ranks 2        # a random rank of two; the other one fails because of it

Every process ends by SIGKILL: at a random moment after a random number of steps, or, every third time, while a
checkpoint is being written. Each start resumes by itself. Saves are synchronous and asynchronous in turn. The model has
dropout, experts and two depths, so weights, optimizer, routers' biases, random numbers, data position and counters must
all be restored. Exit code 1 unless the final weights and optimizer are bit-equal, and every logged metric except the
times is equal at every step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.recipes import get_recipe

SAVE_INTERVAL = 3
TIMED = ("time", "perf/", "checkpoint/")
"""Metrics that measure time; they differ from run to run."""
DEADLINE_S = 180.0
POLL_S = 0.002


def make_config(folder: Path, steps: int, async_save: bool) -> ConfigContainer:
    """A small mixture of experts that saves every few steps and resumes from its own folder."""
    cfg = get_recipe("tiny_moe")
    cfg.model.update(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_moe_experts=4, moe_ffn_hidden_size=32)
    cfg.model.update(moe_shared_expert_intermediate_size=32, seq_length=32, vocab_size=128, hidden_dropout=0.1)
    cfg.train.update(train_iters=steps, global_batch_size=4, micro_batch_size=1)
    cfg.validation.update(eval_interval=5, eval_iters=1)
    saves = str(folder / "checkpoints")
    cfg.checkpoint.update(save=saves, load=saves, save_interval=SAVE_INTERVAL, most_recent_k=3, async_save=async_save)
    cfg.logger.update(log_dir=str(folder), log_interval=1000)
    cfg.dist.update(device="cpu", num_threads=1)
    return cfg


def train(folder: Path, steps: int, async_save: bool, place: dict[str, str]) -> None:
    """One process of the run; writes its result to final_<rank>.json."""
    os.environ |= place
    from megatron_mtp.training.callbacks import Callback
    from megatron_mtp.training.pretrain import pretrain

    class Result(Callback):
        def on_train_end(self, run: Any, state: Any) -> None:
            kept = {**state.to_dict(), "elapsed_s": 0}
            kept["health"].pop("signs", None)  # their windows hold times of steps
            result = {"digest": digest(run.engine), "state": kept}
            (folder / f"final_{place['RANK']}.json").write_text(json.dumps(result, indent=1))

    with (folder / f"rank{place['RANK']}.log").open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        pretrain(make_config(folder, steps, async_save), callbacks=[Result()])


def digest(engine: Any) -> str:
    """SHA-256 over the bytes of every weight, buffer and optimizer tensor of this rank."""
    import torch

    from megatron_mtp.mcore.optimizer import single_optimizers
    from megatron_mtp.model.sharded import unwrap

    found = hashlib.sha256()
    for chunk in engine.chunks:
        model = unwrap(chunk)
        for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
            found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    for single in single_optimizers(engine.optimizer):
        for group in single.optimizer.param_groups:
            for parameter in group["params"]:
                for name, value in sorted(single.optimizer.state[parameter].items()):
                    found.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass(slots=True)
class Job:
    """The processes of one start of the run."""

    folder: Path
    ranks: list[BaseProcess] = field(default_factory=list)

    @classmethod
    def start(cls, folder: Path, steps: int, num_ranks: int, async_save: bool) -> Job:
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        # Torch and Megatron-Core are imported once: a killed run is back in a fraction of a second.
        context.set_forkserver_preload(["megatron_mtp.training.pretrain"])
        job, port = cls(folder), free_port()
        for rank in range(num_ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            place |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            job.ranks.append(context.Process(target=train, args=(folder, steps, async_save, place)))
            job.ranks[-1].start()
        return job

    @property
    def has_ended(self) -> bool:
        return any(rank.exitcode is not None for rank in self.ranks)

    def wait_for_steps(self, count: int) -> None:
        """Returns when this start has logged `count` steps, or has ended."""
        path = self.folder / "metrics.jsonl"
        seen = path.stat().st_size if path.exists() else 0
        self._wait(lambda: _lines_after(path, seen, '"kind": "step"') >= count)

    def wait_for_save(self) -> None:
        """Returns while a checkpoint is being written, or when the run has ended."""
        self._wait(lambda: any((self.folder / "checkpoints").glob("*.partial")))

    def kill(self, rank: int) -> None:
        """SIGKILL for one rank; the others fail because of it, or are killed after a while."""
        self.ranks[rank].kill()
        for process in self.ranks:
            process.join(10)
            process.kill()
            process.join()

    def join(self) -> None:
        for process in self.ranks:
            process.join(DEADLINE_S)
            if process.exitcode != 0:
                log = (self.folder / "rank0.log").read_text()[-2000:]
                sys.exit(f"a run that nobody killed ended with {process.exitcode}:\n{log}")

    def _wait(self, is_so: Any) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not is_so() and not self.has_ended:
            if time.monotonic() > deadline:
                sys.exit(f"nothing happened in {DEADLINE_S} s; see {self.folder}")
            time.sleep(POLL_S)


def _lines_after(path: Path, offset: int, text: str) -> int:
    if not path.exists():
        return 0
    with path.open() as stream:
        stream.seek(offset)
        return stream.read().count(text)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_killed(folder: Path, steps: int, kills: int, num_ranks: int, rng: random.Random) -> dict[str, int]:
    """Kills `kills` times, then lets the run end. Returns how often each moment was met."""
    met = {"while saving": 0, "anywhere": 0, "before the first step": 0}
    done = 0
    while done < kills:
        job = Job.start(folder, steps, num_ranks, async_save=done % 2 == 1)
        # On average a little more than the share of the steps that each start may take.
        wanted = rng.randrange(0, max(2, 2 * steps // kills + SAVE_INTERVAL))
        if wanted:
            job.wait_for_steps(wanted)
        if done % 3 == 0:
            job.wait_for_save()
            time.sleep(rng.uniform(0, 0.01))
        else:
            time.sleep(rng.uniform(0, 0.2 if wanted else 1.0))
        if job.has_ended:
            job.join()
            print(f"the run ended after {done} of {kills} kills: take more steps", flush=True)
            return met
        is_saving = any((folder / "checkpoints").glob("*.partial"))
        job.kill(rng.randrange(num_ranks))
        met["while saving" if is_saving else "anywhere" if wanted else "before the first step"] += 1
        done += 1
    Job.start(folder, steps, num_ranks, async_save=False).join()
    return met


def differences(unbroken: Path, killed: Path, num_ranks: int) -> list[str]:
    """What differs between the two runs."""
    found = []
    for rank in range(num_ranks):
        left, right = (json.loads((folder / f"final_{rank}.json").read_text()) for folder in (unbroken, killed))
        if left["digest"] != right["digest"]:
            found.append(f"rank {rank}: weights or optimizer differ")
        found += [f"state: {k}: {v} != {right['state'][k]}" for k, v in left["state"].items() if right["state"][k] != v]
    for kind in ("step", "evaluation"):
        left, right = (read_metrics(folder / "metrics.jsonl", kind) for folder in (unbroken, killed))
        if len(left) != len(right):
            found.append(f"{len(left)} {kind}s against {len(right)}")
        for a, b in zip(left, right, strict=False):
            names = [name for name in a if not name.startswith(TIMED)]
            found += [f"{kind} {a['iteration']}: {n}: {a[n]} != {b.get(n)}" for n in names if a[n] != b.get(n)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-test-") as name:
        unbroken, killed = Path(name) / "unbroken", Path(name) / "killed"
        begin = time.monotonic()
        Job.start(unbroken, options.steps, options.ranks, async_save=False).join()
        print(f"never stopped: {time.monotonic() - begin:.0f} s", flush=True)
        met = run_killed(killed, options.steps, options.kills, options.ranks, random.Random(options.seed))
        starts = len(read_starts(killed))
        print(f"killed: {time.monotonic() - begin:.0f} s in all, {starts} starts, {met}", flush=True)
        found = differences(unbroken, killed, options.ranks)
        for line in found[:20]:
            print(line)
        print(f"{options.steps} steps, {sum(met.values())} kills, {len(found)} differences", flush=True)
        sys.exit(bool(found) or sum(met.values()) < options.kills)


def read_starts(folder: Path) -> list[str]:
    """The `start` records, those that a later start dropped included."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if '"kind": "start"' in line]


if __name__ == "__main__":
    main()
