"""Megatron-Core's optimizers, with what checkpoints and checks of the gradient norm need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as upstream
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    clip_grads,
    distrib_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import local_multi_tensor_scale
from torch import Tensor

from megatron_mtp.mcore.kept_buffers import KeptBuffers
from megatron_mtp.mcore.patches import replaced


class ReshardableDistributedOptimizer(DistributedOptimizer):
    """The distributed optimizer with a state that is cut into parameters at the right offsets.

    Attributes:
        saved_in: where the joined state is made; None: in new memory.
    """

    saved_in: KeptBuffers | None = None

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As upstream, without its collection of all garbage, which takes longer than everything else together."""
        with replaced(distrib_optimizer, gc=_NoCollection):
            return super().sharded_state_dict(*args, **kwargs)

    def get_parameter_state_dp_zero(
        self, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[Any, Any] | None:
        """As upstream, with the padding after each bucket, and joined in place.

        Upstream 0.19.2 joins the buckets without their padding. The fully reshardable format then cuts out parameters
        at offsets that count it, so that after a padded bucket every weight and moment is read from the wrong place. A
        shared embedding has a bucket of its own: any run whose MTP layers are on another stage than the embedding can
        be hit. Upstream also copies the state five times, each time into new memory.
        """
        group = self.data_parallel_group_gloo if use_gloo_comm else self.data_parallel_group
        is_wanted = return_on_all_ranks or group.rank() == 0
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for index, (buffer, [(dtype, buckets)]) in enumerate(
            zip(self.buffers, (ranges.items() for ranges in self.gbuf_ranges), strict=True)
        ):
            size = sum(bucket.grad_data.numel() for bucket in buffer.buckets)
            joined = {name: self._place(size) for name in ("param", *self.optimizer_state_keys)} if is_wanted else {}
            end = 0
            for bucket, ranges in zip(buffer.buckets, [] if empty_data else buckets, strict=not empty_data):
                start, end = end, end + bucket.grad_data.numel()
                parts = {name: whole[start:end].chunk(group.size()) for name, whole in joined.items()}
                self._gather_bucket(ranges["param_map"], parts, end - start, group, to_all=return_on_all_ranks)
            state[index] = {dtype: {**joined, "numel_unpadded": buffer.numel_unpadded} if is_wanted else {}}
        return state if is_wanted else None

    def _place(self, size: int) -> Tensor:
        """Memory for a joined buffer; what no parameter fills is padding, which stays zero from save to save."""
        return torch.zeros(size) if self.saved_in is None else self.saved_in.take((size,), torch.float32)

    def _gather_bucket(
        self,
        param_map: dict[torch.nn.Parameter, dict[str, Any]],
        parts: dict[str, tuple[Tensor, ...]],
        size: int,
        group: dist.ProcessGroup,
        *,
        to_all: bool,
    ) -> None:
        """Fills `parts`: name -> each rank's shard of a bucket, [size / ranks] fp32 on the CPU. Empty: not wanted."""
        tensors = {parameter: self._get_main_param_and_optimizer_states(parameter) for parameter in param_map}
        on_gpu = dist.get_backend(group) == "nccl"
        for name in ("param", *self.optimizer_state_keys):
            wanted = list(parts[name]) if parts else []
            shard = wanted[0] if wanted and group.size() == 1 else torch.zeros(size // group.size())
            for parameter, ranges in param_map.items():
                place = ranges["gbuf_local"]
                shard[place.start : place.end].copy_(tensors[parameter][name].detach())
            if group.size() == 1:
                continue
            sent = shard.cuda() if on_gpu else shard
            received = [torch.empty_like(sent) for _ in wanted] if on_gpu else wanted
            if to_all:
                dist.all_gather(received, sent, group)
            else:
                dist.gather(sent, received or None, dist.get_process_group_ranks(group)[0], group)
            if on_gpu:
                for part, found in zip(wanted, received, strict=True):
                    part.copy_(found)


class _NoCollection:
    """In the place of the module `gc`."""

    @staticmethod
    def collect() -> None: ...


class TorchAdamDistributedOptimizer(ReshardableDistributedOptimizer):
    """The distributed optimizer over torch's Adam, with a state that can be saved and loaded.

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


def build_optimizer(
    config: OptimizerConfig, chunks: list[MegatronModule], groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """Megatron-Core's optimizer over wrapped chunks, whose state can be saved and loaded from the start.

    torch's Adam runs as one kernel: on two CPU threads its other forms take three to four times as long.

    Raises:
        ImportError: the update rule needs a package that is not installed.
    """
    distributed = ReshardableDistributedOptimizer if HAVE_APEX_OR_TE else TorchAdamDistributedOptimizer
    with replaced(upstream, DistributedOptimizer=distributed):
        optimizer = upstream.get_megatron_optimizer(config, chunks, use_gloo_process_groups=False, pg_collection=groups)
    for single in single_optimizers(optimizer):
        for kind, function in _STATE_FUNCTIONS.items():
            if isinstance(single.optimizer, kind):
                single.init_state_fn = function
        if isinstance(single.optimizer, torch.optim.Adam):
            _fuse(single.optimizer)
            single.optimizer.register_load_state_dict_post_hook(_fuse)
    return optimizer


def _fuse(inner: torch.optim.Optimizer) -> None:
    """Chooses the fused kernel, also after a load: a checkpoint brings the options of the run that wrote it."""
    for group in inner.param_groups:
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            if "step" in (state := inner.state.get(parameter, {})):
                state["step"] = state["step"].to(parameter.device)  # where the fused kernel wants it


def single_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain, without those that hold no parameter on this rank."""
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [single for single in chain if not getattr(single, "is_stub_optimizer", False)]


def initialize_optimizer_state(single: MegatronOptimizer) -> None:
    """Makes the state that the first step would make, where it is missing.

    Loading needs the tensors to load into, and a save before the first step needs them to be there.
    """
    single.init_state_fn(single.optimizer, single.config)


def _adam_state(inner: torch.optim.Adam, config: object = None) -> None:
    """As upstream's function for Adam, with the `step` of torch's Adam."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                on_device = group.get("capturable") or group.get("fused")
                inner.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu"),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _sgd_state(inner: torch.optim.SGD, config: object = None) -> None:
    """Upstream has no such function for SGD."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            if group["momentum"] and inner.state[parameter].get("momentum_buffer") is None:
                inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


_STATE_FUNCTIONS: dict[type[torch.optim.Optimizer], Callable[..., None]] = {
    torch.optim.Adam: _adam_state,
    torch.optim.SGD: _sgd_state,
}


def guarded_step(
    optimizer: ChainedOptimizer, permits: Callable[[float], bool]
) -> tuple[bool, float | None, int | None]:
    """`optimizer.step()`, which examines the gradient norm before it applies anything, and clips in place.

    Upstream divides by a norm that is not finite and applies the result, except under fp16. Without kernels of Apex or
    Transformer Engine it scales every gradient into a copy and copies that back.

    Args:
        permits: called with the norm before clipping, unless an fp16 overflow ends the step first.

    Returns:
        Whether the update was applied, the norm (None after an overflow), and the number of zeros (None if not
        counted).
    """
    step, found = optimizer.step_with_ready_grads, {}

    def get_grad_norm() -> float:
        found["norm"] = type(optimizer).get_grad_norm(optimizer)
        return found["norm"]

    def step_with_ready_grads() -> bool:
        return step() if permits(float(found["norm"])) else False

    scale = _scale_in_place if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale else None
    with (
        replaced(optimizer, get_grad_norm=get_grad_norm, step_with_ready_grads=step_with_ready_grads),
        replaced(clip_grads, **({"multi_tensor_scale_impl": scale} if scale else {})),
    ):
        updated, norm, num_zeros = optimizer.step()
    return bool(updated), None if norm is None else float(norm), num_zeros


def _scale_in_place(_: int, noop_flag: object, tensor_lists: list[list[torch.Tensor]], scale: float) -> None:
    """As `local_multi_tensor_scale`: the second list becomes the first one times `scale`. Clipping passes one twice."""
    sources, targets = tensor_lists
    assert all(source is target for source, target in zip(sources, targets, strict=True))
    torch._foreach_mul_(targets, scale)


def set_master_weights(singles: list[MegatronOptimizer], parameters: set[torch.nn.Parameter]) -> None:
    """Sets the fp32 master weights of some parameters of the model to these parameters."""
    for single in singles:
        if isinstance(single, DistributedOptimizer):
            for parameter in single.model_param_group_index_map.keys() & parameters:
                group, place = single.model_param_group_index_map[parameter]
                held = single._get_model_param_range_map(parameter)["param"]
                shard = parameter.detach().view(-1)[held.start : held.end]
                single.optimizer.param_groups[group]["params"][place].detach().copy_(shard)
        elif isinstance(single, Float16OptimizerWithFloat16Params):
            pairs = zip(single.float16_groups, single.fp32_from_float16_groups, strict=True)
            for model, main in (pair for groups in pairs for pair in zip(*groups, strict=True)):
                if model in parameters:
                    main.detach().copy_(model.detach())


def copy_master_weights_to_model(singles: list[MegatronOptimizer], chunks: list[DistributedDataParallel]) -> None:
    """Sets the model's weights to the fp32 master weights, on every data-parallel rank."""
    for single in singles:
        if isinstance(single, DistributedOptimizer):
            single._copy_main_params_to_model_params()
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def gather_weights(chunks: list[DistributedDataParallel]) -> None:
    """Fetches the last update of the shards of other ranks now.

    With overlap_param_gather it would arrive with the next forward pass.
    """
    for chunk in chunks:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            chunk.start_param_sync(force_sync=True)
