"""The one place that knows Megatron-Core's private names, version differences and global parallel state.

Everything else takes process groups as arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import common as gated_delta_net
from megatron.core.tensor_parallel.random import HAVE_TE
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker


class _CheckpointWithoutFP8(tensor_parallel.CheckpointWithoutOutput):
    """Megatron-Core's recomputation of norms and latents, where Transformer Engine is not installed.

    Upstream reads its default, fp8=False, as "FP8 may be on" and asks Transformer Engine, which ends in a NameError.
    """

    def __init__(self, fp8: object = False):
        super().__init__(fp8 or None)


if not HAVE_TE:
    tensor_parallel.CheckpointWithoutOutput = _CheckpointWithoutFP8

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
    """Forgets the groups of a layout and every global of Megatron-Core that outlives a model.

    Groups of gloo stay for the next layout of this process and end with the default group.
    """
    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    destroy_moe_metrics_tracker()
    if not dist.is_initialized():
        _gloo_groups.clear()
        return
    for group in groups:
        if group not in _gloo_groups.values():
            dist.destroy_process_group(group)


# Sorted ranks -> group, for as long as the default group beside it lives.
_gloo_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
_gloo_world: dist.ProcessGroup | None = None


@contextmanager
def _gloo_groups_made_once() -> Iterator[None]:
    """On gloo, one group for each set of ranks, whatever it is for and however many layouts this process builds.

    Megatron-Core makes about thirty groups of a few ranks, most of them over the same sets. Each gloo group polls with two threads
    until nothing refers to it any more: two ranks had 57 threads, and a process that went through a dozen layouts a
    thousand, which starved the machine. NCCL's groups stay apart: its communicators order their work by group.
    """
    global _gloo_world
    if dist.get_backend() != "gloo":
        yield
        return
    if _gloo_world is not dist.group.WORLD:
        _gloo_groups.clear()
        _gloo_world = dist.group.WORLD
    make = dist.new_group

    def made_once(ranks: list[int], **options: Any) -> dist.ProcessGroup:
        key = tuple(sorted(ranks))
        if key not in _gloo_groups:
            _gloo_groups[key] = make(ranks, **options)
        return _gloo_groups[key]

    dist.new_group = made_once
    try:
        yield
    finally:
        dist.new_group = make


def seed_dropout(seed: int, *, pp_rank: int) -> None:
    """Seeds the tensor-parallel random number tracker that dropout draws from; data-parallel ranks share the seed."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * pp_rank, force_reset_rng=True)


def router_losses(num_layers: int) -> dict[str, torch.Tensor]:
    """Takes and clears what MoE routers recorded in this step on this rank: name -> [num_layers] sums over micro-batches."""
    tracker = get_moe_metrics_tracker()
    recorded = {name: entry.values.clone() for name, entry in tracker.metrics.items()}
    for entry in tracker.metrics.values():
        entry.values.zero_()
    return {name: values[:num_layers] for name, values in recorded.items()}


class ReshardableDistributedOptimizer(DistributedOptimizer):
    """The distributed optimizer, whose state is cut into parameters where they are."""

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        """As upstream, with the padding behind each bucket left in.

        Upstream 0.19.2 joins the buckets without it, and the fully reshardable format then cuts parameters out at offsets that
        count it: behind a padded bucket every weight and moment is read from the wrong place. A shared embedding has a bucket
        of its own, so any run whose MTP layers are on another stage than the embedding can be hit.
        """
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
        if state is None:
            return None
        for index, buffer in enumerate(self.buffers):
            for tensors in state[index].values():
                for name, value in tensors.items():
                    if isinstance(value, torch.Tensor):
                        tensors[name] = _with_padding(value, buffer.buckets)
        return state


def _with_padding(joined: torch.Tensor, buckets: list[Any]) -> torch.Tensor:
    parts = joined.split([bucket.numel_unpadded for bucket in buckets])
    return torch.cat(
        [
            torch.nn.functional.pad(part, (0, bucket.grad_data.numel() - part.numel()))
            for part, bucket in zip(parts, buckets, strict=True)
        ]
    )


class TorchAdamDistributedOptimizer(ReshardableDistributedOptimizer):
    """The distributed optimizer over torch's Adam, made fit for checkpoints.

    torch keeps a `step` tensor for each parameter, which Megatron-Core's save and load do not expect.
    """

    def state_dict(self) -> dict[str, Any]:
        """As upstream; a rank whose shard holds no parameter has no step, which upstream's assertion forgets."""
        if self.optimizer.state:
            return super().state_dict()
        groups = self.optimizer.state_dict()["param_groups"]
        groups = [{k: v for k, v in group.items() if k != "params"} | {"step": 0.0} for group in groups]
        scaler = {"grad_scaler": self.grad_scaler.state_dict()} if self.grad_scaler else {}
        return {"optimizer": {"param_groups": groups}, **scaler}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As upstream, which gives all parameters one shared step tensor: Adam would count it up once for each."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def _set_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        # Upstream looks every tensor of the state up in `tensors`; `step` is restored by load_state_dict.
        super()._set_main_param_and_optimizer_states(model_param, {"step": None, **tensors})


def single_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers a chain is made of, without those that hold no parameter on this rank, each fit for checkpoints."""
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    singles = [single for single in chain if not getattr(single, "is_stub_optimizer", False)]
    for single in singles:
        if type(single) is DistributedOptimizer:
            single.__class__ = ReshardableDistributedOptimizer if HAVE_APEX_OR_TE else TorchAdamDistributedOptimizer
    return singles


def initialize_optimizer_state(single: MegatronOptimizer) -> None:
    """Gives torch's Adam and SGD the state that they would make at their first step, where it is missing.

    Loading needs the tensors to load into, and a save before the first step needs them to be there. Upstream's own
    hooks leave out `step` and have nothing for SGD.
    """
    inner = single.optimizer
    if isinstance(inner, torch.optim.Adam):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    on_device = group.get("capturable") or group.get("fused")
                    inner.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu"),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
    elif isinstance(inner, torch.optim.SGD):
        single.init_state_fn = lambda *_: None
        for group in inner.param_groups:
            for parameter in group["params"]:
                if group["momentum"] and inner.state[parameter].get("momentum_buffer") is None:
                    inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    else:
        single.init_state_fn(inner, single.config)


def guarded_step(
    optimizer: ChainedOptimizer, permits: Callable[[float], bool]
) -> tuple[bool, float | None, int | None]:
    """`optimizer.step()`, with a look at the norm of the gradient before anything is applied.

    Upstream divides by a norm that is not finite and applies the result, except under fp16.

    Args:
        permits: called with the norm before clipping, unless an fp16 overflow ends the step first.

    Returns:
        Whether the update was applied, the norm (None after an overflow), and the number of zeros (None if not counted).
    """
    upstream, found = optimizer.step_with_ready_grads, {}

    def get_grad_norm() -> float:
        found["norm"] = type(optimizer).get_grad_norm(optimizer)
        return found["norm"]

    def step_with_ready_grads() -> bool:
        return upstream() if permits(float(found["norm"])) else False

    optimizer.get_grad_norm, optimizer.step_with_ready_grads = get_grad_norm, step_with_ready_grads
    try:
        updated, norm, num_zeros = optimizer.step()
    finally:
        del optimizer.get_grad_norm, optimizer.step_with_ready_grads
    return bool(updated), None if norm is None else float(norm), num_zeros


def copy_master_weights_to_model(singles: list[MegatronOptimizer], chunks: list[torch.nn.Module]) -> None:
    """Makes the model's weights what the fp32 master weights say, on every data-parallel rank."""
    for single in singles:
        if isinstance(single, DistributedOptimizer):
            single._copy_main_params_to_model_params()
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def to_torch_items(sharded_state_dict: ShardedStateDict) -> dict[str, Any]:
    """What this rank writes: the shards of which it is the main replica, by key, in the form torch's checkpoints take."""
    by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
        sharded_state_dict, keep_only_main_replica=True
    )
    return torch_dist.mcore_to_pyt_state_dict(by_key, is_loading=False)


def has_flash_linear_attention() -> bool:
    """Whether the kernels of linear attention can be imported."""
    return gated_delta_net.HAVE_FLA


@contextmanager
def pretend_flash_linear_attention() -> Iterator[None]:
    """Inside, Megatron-Core builds a gated delta net without those kernels, which its path in plain PyTorch never calls."""
    before = gated_delta_net.HAVE_FLA
    gated_delta_net.HAVE_FLA = True
    try:
        yield
    finally:
        gated_delta_net.HAVE_FLA = before


@contextmanager
def watch_calls(around: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    """Inside, every call of a chunk by a schedule runs within `around("forward")` or `around("backward")`: what a pipeline stage
    does between two messages, the loss function and the gradient hooks included."""
    before = {name: getattr(schedules, f"{name}_step") for name in ("forward", "backward")}

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with around(name):
                return before[name](*args, **kwargs)

        return call

    for name in before:
        setattr(schedules, f"{name}_step", watched(name))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(schedules, f"{name}_step", function)
