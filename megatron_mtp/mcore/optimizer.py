"""Megatron-Core's optimizers, with what checkpoints and checks of the gradient norm need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer


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
