"""Predicted against measured peak memory of a training step, over layouts, models and dtypes of this machine's size.

    python benchmarks/plan_memory.py

Prints one line for each rank. Exit code 1 if a prediction is off by more than 10 %.
"""

from __future__ import annotations

import sys

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.device.worker_pool import WorkerPool
from megatron_mtp.profile.peak_memory import PeakMemory, measure_peak
from megatron_mtp.recipes import get_recipe
from megatron_mtp.verify.run import PRELOAD

MIB = 2**20
TOLERANCE = 0.10
# Wide and long enough for activations to matter, small enough for a laptop.
SIZE = (
    "model.num_layers=4 model.hidden_size=256 model.ffn_hidden_size=768 model.seq_length=256 model.vocab_size=2048 "
    "train.micro_batch_size=2 train.global_batch_size=8 dist.device=cpu dist.num_threads=1 validation.eval_iters=0"
)
MOE = "model.moe_ffn_hidden_size=256 model.moe_shared_expert_intermediate_size=256"
MLA = "model.q_lora_rank=96 model.kv_lora_rank=64 model.qk_head_dim=32 model.qk_pos_emb_head_dim=16 model.v_head_dim=32"
PP2 = "model.pipeline_model_parallel_size=2"
UNIFORM = "model.recompute_granularity=full model.recompute_method=uniform model.recompute_num_layers=1"
# (recipe, ranks, changes)
CASES = [
    ("tiny_dense", 1, ""),
    ("tiny_dense", 1, "model.mtp_num_layers=0"),
    ("tiny_dense", 1, UNIFORM),
    ("tiny_dense", 1, "precision.dtype=bf16"),
    ("tiny_dense", 2, PP2),
    ("tiny_dense", 2, f"{PP2} model.pipeline_model_parallel_layout=[2,2]"),
    ("tiny_dense", 2, f"{PP2} model.virtual_pipeline_model_parallel_size=2"),
    ("tiny_dense", 2, f"{PP2} {UNIFORM} precision.dtype=bf16"),
    ("tiny_dense", 2, "ddp.use_distributed_optimizer=true"),
    ("tiny_dense", 2, "ddp.use_distributed_optimizer=false"),
    ("tiny_dense", 2, "model.tensor_model_parallel_size=2 model.sequence_parallel=true"),
    ("tiny_moe", 1, MOE),
    ("tiny_mla_moe", 2, f"{PP2} {MOE} {MLA}"),
]


def main() -> int:
    """Measures every case and returns the exit code."""
    worst = 0.0
    print(f"{'rank':>4} {'measured':>9} {'predicted':>9} {'error':>7} {'held':>8} {'resident':>9}  MiB")
    for ranks in (1, 2):
        with WorkerPool(ranks, timeout_s=600, preload=PRELOAD) as pool:
            for recipe, size, changes in CASES:
                if size == ranks:
                    print(f"{recipe}, {ranks} rank(s): {changes or 'as it is'}", flush=True)
                    found = pool.run(measure_peak, config(recipe, changes, ranks))
                    worst = max([worst, *(abs(line(one)) for one in found)])
    print(f"largest error {worst:.1%}")
    return int(worst > TOLERANCE)


def config(recipe: str, changes: str, ranks: int) -> ConfigContainer:
    """The finalized config of a case."""
    cfg = get_recipe(recipe)
    apply_overrides(cfg, [*SIZE.split(), *changes.split()])
    return cfg.finalize(ranks)


def line(one: PeakMemory) -> float:
    """Prints the measurement of one rank and returns its error."""
    sizes = (one.peak, one.predicted.total)
    print(
        f"{one.rank:>4} {sizes[0] / MIB:>9.1f} {sizes[1] / MIB:>9.1f} {one.error:>+7.1%} {one.held / MIB:>8.1f} "
        f"{one.resident / MIB:>9.0f}",
        flush=True,
    )
    return one.error


if __name__ == "__main__":
    sys.exit(main())
