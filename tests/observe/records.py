"""Records for the tests of this folder."""

from __future__ import annotations

from typing import Any

from megatron_mtp.observe.metrics import StepRecord


def make_record(iteration: int = 100, **changes: Any) -> StepRecord:
    """A record with every field set; `changes` replace fields."""
    fields: dict[str, Any] = {
        "iteration": iteration,
        "train_iters": 300000,
        "consumed_samples": 32 * iteration,
        "consumed_tokens": 32 * 4096 * iteration,
        "elapsed_ms": 3738.6,
        "learning_rate": 6e-5,
        "global_batch_size": 32,
        "losses": {"lm loss": 7.968678, "load_balancing_loss": 1.329517, "mtp_1 loss": 7.925096},
        "loss_scale": 1.0,
        "grad_norm": 1.04,
        "num_zeros": 17,
        "tokens_per_s_per_device": 1234.5,
        "tflops_per_device": 312.25,
        "mfu": 0.3158,
        "extra": {"mtp_1 acceptance": 0.25},
    }
    return StepRecord(**fields | changes)
