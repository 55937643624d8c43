"""What a checkpoint holds of model, optimizer and random numbers, as shards that any layout can read.

Only tensors are saved as shards. An optimizer's scalars (step count, loss scale) go to train_state.json. Its learning
rates and parameter groups are not saved: groups differ between pipeline stages, and rates follow from the schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.transformer.module import MegatronModule
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mtp.checkpoint.random_state import RNG_KEY, random_state
from megatron_mtp.errors import UnsupportedError
from megatron_mtp.mcore.kept_buffers import KeptBuffers
from megatron_mtp.mcore.optimizer import (
    ReshardableDistributedOptimizer,
    initialize_optimizer_state,
    single_optimizers,
)
from megatron_mtp.model.sharded import unwrap

COMMON_KEY = "common_state"  # Megatron-Core's own object; holds nothing of ours
OPTIMIZER_PREFIX = "optimizer."
EXTRA_STATE = "_extra_state"

# Where the tensors are in the state of each kind of optimizer; everything else in it is rebuilt, not stored.
_TENSOR_PATHS: dict[type, tuple[tuple[str, ...], ...]] = {
    DistributedOptimizer: (("param_state",),),
    Float16OptimizerWithFloat16Params: (("optimizer", "state"), ("fp32_from_fp16_params",)),
    FP32Optimizer: (("state",),),
}


@dataclass(frozen=True, slots=True)
class Content:
    """Model chunks and optimizer of this rank.

    Attributes:
        chunks: one for each virtual stage; wrapped or bare.
        optimizer: None if its state is neither saved nor loaded.
        dp_cp_group: ranks that hold the same weights.
    """

    chunks: list[nn.Module]
    optimizer: MegatronOptimizer | None
    dp_cp_group: ProcessGroup

    def for_saving(self) -> ShardedStateDict:
        """Shards of everything; those of live tensors are views."""
        state = self._model_state()
        for index, single in enumerate(self.singles()):
            state[f"optimizer{index}"] = _take(
                _optimizer_state(single, state, self._metadata(), is_loading=False), single
            )
        shape = (torch.distributed.get_world_size(),)
        offset = (torch.distributed.get_rank(),)
        state[RNG_KEY] = ShardedObject(RNG_KEY, random_state(), shape, offset)
        return state

    def for_loading(self, *, with_random_state: bool) -> LoadPlan:
        """Shards to fill, with what is needed to give them to model and optimizer."""
        state = self._model_state()
        states = [_optimizer_state(single, state, self._metadata(), is_loading=True) for single in self.singles()]
        for index, (single, full) in enumerate(zip(self.singles(), states, strict=True)):
            state[f"optimizer{index}"] = _take(full, single)
        if with_random_state:
            shape = (torch.distributed.get_world_size(),)
            state[RNG_KEY] = ShardedObject(RNG_KEY, None, shape, (torch.distributed.get_rank(),))
        return LoadPlan(self, state, states)

    def singles(self) -> list[MegatronOptimizer]:
        """The optimizers that hold parameters on this rank."""
        return [] if self.optimizer is None else single_optimizers(self.optimizer)

    def save_in(self, buffers: KeptBuffers) -> None:
        """From now on `for_saving` joins shards of optimizer states in these buffers."""
        for single in self.singles():
            if isinstance(single, ReshardableDistributedOptimizer):
                single.saved_in = buffers

    def live_storages(self) -> set[int]:
        """Addresses of the memory that training continues to write to."""
        models = [unwrap(chunk) for chunk in self.chunks]  # DDP's `buffers` are something else
        tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
        for single in self.singles():
            for group in single.optimizer.param_groups:
                tensors += group["params"]
            for state in single.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def named_chunks(self) -> dict[str, MegatronModule]:
        """The models of this rank under the names that Megatron-Core's optimizers look for."""
        names = ["model"] if len(self.chunks) == 1 else [f"model{index}" for index in range(len(self.chunks))]
        return {name: unwrap(chunk) for name, chunk in zip(names, self.chunks, strict=True)}

    def _model_state(self) -> ShardedStateDict:
        return {
            name: _without_extra_state(model.sharded_state_dict(metadata=self._metadata()))
            for name, model in self.named_chunks().items()
        }

    def _metadata(self) -> dict[str, Any]:
        return {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            "dp_cp_group": self.dp_cp_group,
        }


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Shards to fill, then `adopt`."""

    content: Content
    state: ShardedStateDict
    optimizer_states: list[dict[str, Any]]

    def adopt(self, loaded: dict[str, Any], scalars: dict[str, Any]) -> None:
        """Gives the loaded tensors to the model and the optimizer.

        Args:
            loaded: `state` with tensors in place of shards.
            scalars: result of `optimizer_scalars` when the checkpoint was saved.
        """
        for name, model in self.content.named_chunks().items():
            odd = model.load_state_dict(loaded[name], strict=False)
            missing = [key for key in odd.missing_keys if not key.endswith(EXTRA_STATE)]
            assert not missing, f"{name} was given nothing for {missing}"
            assert not odd.unexpected_keys, f"{name} has no place for {odd.unexpected_keys}"
        for index, (single, full) in enumerate(zip(self.content.singles(), self.optimizer_states, strict=True)):
            _put_back(full, loaded.get(f"optimizer{index}", {}), single)
            _set_scalars(full, scalars, single)
            single.load_state_dict(full)

    def requested_keys(self) -> set[str]:
        """Keys that this rank wants from the checkpoint."""
        shards: set[str] = set()
        for item in nested_values(extract_sharded_base(self.state)[0]):
            built = item.build() if isinstance(item, ShardedTensorFactory) else item
            parts = nested_values(built) if isinstance(built, dict | list) else [built]
            shards |= {part.key for part in parts if isinstance(part, ShardedBase)}
        return shards


def _without_extra_state(state: ShardedStateDict) -> ShardedStateDict:
    """Leaves out the FP8 state of Transformer Engine's modules: it is unused in other dtypes, ties a checkpoint to one
    backend, and is unpickled without restrictions when it is loaded."""
    return {name: shard for name, shard in state.items() if not name.endswith(EXTRA_STATE)}


def optimizer_scalars(content: Content) -> dict[str, Any]:
    """Step count of the optimizer and state of the loss scale, as JSON values; equal on every rank that has them."""
    scalars: dict[str, Any] = {"step": None, "grad_scaler": None}
    for single in content.singles():
        if (step := _step_count(single)) is not None:
            scalars["step"] = step
        if scaler := getattr(single, "grad_scaler", None):
            values = scaler.state_dict()
            scalars["grad_scaler"] = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    return scalars


def _step_count(single: MegatronOptimizer) -> int | None:
    """Number of updates, without skipped steps; None for optimizers that do not count, or without parameters here."""
    for state in single.optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    steps = [group["step"] for group in single.optimizer.param_groups if group["params"] and "step" in group]
    return int(steps[0]) if steps else None


def _optimizer_state(
    single: MegatronOptimizer, model_state: ShardedStateDict, metadata: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    _paths(single)
    initialize_optimizer_state(single)
    return single.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)


def _paths(single: MegatronOptimizer) -> tuple[tuple[str, ...], ...]:
    for kind, paths in _TENSOR_PATHS.items():
        if isinstance(single, kind):
            return paths
    raise UnsupportedError(
        f"checkpoint.save_optim = True: the state of {type(single).__name__} cannot be saved. "
        "Set checkpoint.save_optim=false and checkpoint.load_optim=false, or use optimizer.optimizer=adam."
    )


def _take(full: dict[str, Any], single: MegatronOptimizer) -> dict[str, Any]:
    """The tensors of an optimizer's state, by path."""
    taken = {}
    for path in _paths(single):
        part = full
        for name in path:
            part = part[name]
        if path[-1] == "state":
            part.pop("common_step", None)
        taken[".".join(path)] = part
    return taken


def _put_back(full: dict[str, Any], loaded: dict[str, Any], single: MegatronOptimizer) -> None:
    """The inverse of `_take`: puts tensors in place of shards, and unwraps what is never stored.

    Of an optimizer without parameters on this rank nothing was asked for and nothing is loaded: it stays as it is.
    """
    for path in _paths(single):
        owner = full
        for name in path[:-1]:
            owner = owner[name]
        owner[path[-1]] = loaded.get(".".join(path), owner[path[-1]])
    for group in _groups(full):
        if isinstance(group.get("params"), LocalNonpersistentObject):
            group["params"] = group["params"].unwrap()


def _set_scalars(full: dict[str, Any], scalars: dict[str, Any], single: MegatronOptimizer) -> None:
    step = scalars["step"]
    if isinstance(single, DistributedOptimizer):
        for group in _groups(full):
            if step is not None:
                group["step"] = step
    elif step is not None:
        full.get("optimizer", full)["state"]["common_step"] = torch.tensor(float(step))
    if scaler := getattr(single, "grad_scaler", None):
        saved = scalars["grad_scaler"]
        present = scaler.state_dict()
        if saved is not None and saved.keys() == present.keys():  # another kind of scaler starts from its initial state
            full["grad_scaler"] = {
                name: torch.tensor([value]) if isinstance(present[name], torch.Tensor) else value
                for name, value in saved.items()
            }


def _groups(full: dict[str, Any]) -> list[dict[str, Any]]:
    return full.get("optimizer", full)["param_groups"]
