"""The one place that knows Megatron-Core's private names, version differences and global parallel state.

Everything else takes process groups as arguments.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker

RANK_ORDER = "tp-cp-ep-dp-pp"
RANK_ORDER_PP_DP = "tp-cp-ep-pp-dp"


def quiet_known_notices() -> None:
    """Filters notices of Megatron-Core that tell our users nothing they can act on.

    GPTModel announces its successor at every construction (docs/decisions.md says why we use it); the schedules warn
    about Apex and Transformer Engine being absent, which `doctor` reports with what to do.
    """
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    for message in (".*Apex is not installed.*", ".*[Tt]ransformer [Ee]ngine.*not installed.*", ".*nvidia-resiliency-ext.*"):
        warnings.filterwarnings("ignore", message=message)


def init_model_parallel(
    *,
    tp: int,
    pp: int,
    vp: int | None,
    cp: int,
    ep: int,
    etp: int,
    embedding_stages: list[int],
    pp_before_dp: bool = False,
    timeout: timedelta = timedelta(minutes=10),
) -> ProcessGroupCollection:
    """Makes every process group of a layout and returns them.

    Args:
        embedding_stages: pipeline stages that hold a copy of the embedding, the first included. The default of
            Megatron-Core, [first, last], would add the output layer's gradient to the embedding's when a standalone MTP
            stage holds the copy.
        pp_before_dp: rank order tp-cp-ep-pp-dp in place of tp-cp-ep-dp-pp.
    """

    def embedding_ranks(pp_ranks: list[int], _: int | None = None) -> list[int]:
        return [pp_ranks[stage] for stage in embedding_stages]

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        order=RANK_ORDER_PP_DP if pp_before_dp else RANK_ORDER,
        get_embedding_ranks=embedding_ranks,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
        # With gloo as the default backend these would be second copies of the same groups.
        create_gloo_process_groups=torch.distributed.get_backend() != "gloo" and "fake" not in torch.distributed.get_backend(),
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def destroy_model_parallel() -> None:
    """Forgets all groups and every global of Megatron-Core that outlives a model."""
    parallel_state.destroy_model_parallel()
    destroy_moe_metrics_tracker()


def seed_dropout(seed: int, *, pp_rank: int, dp_rank: int = 0) -> None:
    """Seeds the tensor-parallel random number tracker that dropout draws from."""
    del dp_rank  # Megatron's convention: data-parallel ranks share the seed, their data differ
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * pp_rank, force_reset_rng=True)


def router_losses(num_layers: int) -> dict[str, torch.Tensor]:
    """Takes and clears what MoE routers recorded in this step on this rank: name -> [num_layers] sums over micro-batches."""
    tracker = get_moe_metrics_tracker()
    recorded = {name: entry.values.clone() for name, entry in tracker.metrics.items()}
    for entry in tracker.metrics.values():
        entry.values.zero_()
    return {name: values[:num_layers] for name, values in recorded.items()}


