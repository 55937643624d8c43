"""Megatron-Core's global parallel state: the process groups of a layout. Nothing outside this package reads it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from megatron_mtp.mcore import collectives, main_grad, recompute
from megatron_mtp.mcore.patches import replaced

RANK_ORDER = "tp-cp-ep-dp-pp"
RANK_ORDER_PP_DP = "tp-cp-ep-pp-dp"


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

    recompute.install()
    collectives.install()
    main_grad.install()
    with _gloo_groups_made_once():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vp,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
            order=RANK_ORDER_PP_DP if pp_before_dp else RANK_ORDER,
            get_embedding_ranks=embedding_ranks,
            distributed_timeout_minutes=timeout.total_seconds() / 60,
            # With gloo as the default backend these would be second copies of the same groups.
            create_gloo_process_groups=not dist.get_backend().startswith(("gloo", "fake")),
        )
    return ProcessGroupCollection.use_mpu_process_groups()


def destroy_model_parallel() -> None:
    """Destroys the groups of a layout and clears every global of Megatron-Core that outlives a model.

    Groups of gloo stay for the next layout of this process and end with the default group.
    """
    recompute.uninstall()
    collectives.uninstall()
    main_grad.uninstall()
    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    destroy_moe_metrics_tracker()
    # The schedules set them to 1 / num_microbatches at each step and nobody puts them back.
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    if not dist.is_initialized():
        _gloo_groups.clear()
        return
    for group in groups:
        if group not in _gloo_groups.values():
            dist.destroy_process_group(group)


# Sorted ranks -> group, or torch's mark where this rank is not a member; for as long as the default group lives.
_gloo_groups: dict[tuple[int, ...], dist.ProcessGroup | int] = {}
_gloo_world: dist.ProcessGroup | None = None


def _gloo_groups_made_once() -> AbstractContextManager[None]:
    """On gloo, one group for each set of ranks, whatever it is for and however many layouts this process builds.

    Megatron-Core makes about thirty groups of a few ranks, most of them over the same sets. Each gloo group polls with
    two threads until nothing refers to it any more: two ranks had 57 threads, and a process that went through a dozen
    layouts a thousand, which starved the machine. NCCL's groups stay separate: its communicators order work by group.
    """
    global _gloo_world
    if dist.get_backend() != "gloo":
        return nullcontext()
    if _gloo_world is not dist.group.WORLD:
        _gloo_groups.clear()
        _gloo_world = dist.group.WORLD
    make = dist.new_group

    def made_once(ranks: list[int], **options: Any) -> dist.ProcessGroup | int:
        key = tuple(sorted(ranks))
        if key not in _gloo_groups:
            _gloo_groups[key] = make(ranks, **options)
        return _gloo_groups[key]

    return replaced(dist, new_group=made_once)


def seed_dropout(seed: int, *, pp_rank: int) -> None:
    """Seeds the tensor-parallel random number tracker that dropout draws from; data-parallel ranks share the seed."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * pp_rank, force_reset_rng=True)
