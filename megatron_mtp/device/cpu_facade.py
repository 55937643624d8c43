"""Maps the parts of `torch.cuda` that Megatron-Core 0.19 calls while training onto the CPU or the meta device.

Megatron-Core names "cuda" in its source and asks `torch.cuda` for devices, streams and random states whatever the
backend. `install` replaces exactly those names, and nothing is replaced before it is called. `torch.cuda.is_available`
and `torch.cuda.is_initialized` stay honest: every place that asks them in Megatron-Core copes with False.

Each replacement says which call of Megatron-Core (paths below megatron/core) needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device

# Factories that Megatron-Core calls with device="cuda" (schedules.py: zeros; optimizer/grad_scaler.py: tensor;
# dist_checkpointing/exchange_utils.py: empty, empty_like; transformer/utils.py: ones), or with pin_memory=True
# (models/common/embeddings/rope_utils.py: tensor). full and arange: upstream's own examples use them the same way.
_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like")

_MCORE_RANDOM = "megatron.core.tensor_parallel.random"

_undo: list[tuple[Any, str, Any, bool]] = []
_target: torch.device | None = None


class Stream:
    """A stream on a device that has only one: nothing runs beside it, so nothing waits."""

    _only: Stream | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Stream:
        # One object, so that `current_stream() != side_stream` (token_dispatcher.py) is False and no code for a second
        # stream runs.
        if cls._only is None:
            cls._only = super().__new__(cls)
        return cls._only

    def wait_stream(self, stream: Stream) -> None:
        """Returns at once."""

    def wait_event(self, event: Event) -> None:
        """Returns at once."""

    def synchronize(self) -> None:
        """Returns at once."""

    def record_event(self, event: Event | None = None) -> Event:
        """Returns an event that has happened."""
        return event or Event()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority: there is one."""
        return 0, 0


class Event:
    """An event on a device without streams: it has happened."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, stream: Stream | None = None) -> None:
        """Returns at once."""

    def wait(self, stream: Stream | None = None) -> None:
        """Returns at once."""

    def synchronize(self) -> None:
        """Returns at once."""

    def query(self) -> bool:
        """True: done."""
        return True


class _SharedGenerator(logging.Filter):
    """Drops Megatron-Core's warning that the CPU's random state moved inside a fork of the GPU's: here both are one."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


_shared_generator = _SharedGenerator()


def installed() -> torch.device | None:
    """The device that "cuda" stands for at present, or None if the facade is not installed."""
    return _target


def install(target: str | torch.device = "cpu") -> None:
    """Makes "cuda" mean `target` for the calls that Megatron-Core makes. Calling it again with the same target does nothing.

    Args:
        target: "cpu", or "meta" for a dry run that allocates nothing.

    Raises:
        ValueError: the target is another device, or the facade is installed for the other target.
    """
    global _target
    device = torch.device(target)
    if device.type not in ("cpu", "meta"):
        raise ValueError(f"the facade maps torch.cuda onto cpu or meta, not onto {device}")
    if _target == device:
        return
    if _target is not None:
        raise ValueError(f"the facade maps torch.cuda onto {_target} already; uninstall it before installing {device}")
    # `with torch.device("meta")` looks factories up in a cached set of the original functions. Fill that cache first,
    # or the context manager no longer recognises them.
    torch.utils._device._device_constructors()
    _target = device
    _map_devices(device)
    _map_streams()
    _map_random_state()
    _map_factories(device)
    _map_tensor_methods(device)
    _map_collectives()
    # Megatron-Core wraps small functions (router losses, activations) in torch.compile. On a CPU that needs a C++ compiler and
    # 20 s at the first step, and fused sums round in another order than the plain ones.
    torch.compiler.set_stance("force_eager")
    logging.getLogger(_MCORE_RANDOM).addFilter(_shared_generator)


def uninstall() -> None:
    """Puts everything back as it was."""
    global _target
    for owner, name, original, was_own in reversed(_undo):
        if was_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)  # torch.Tensor inherits these from TensorBase
    _undo.clear()
    _target = None
    torch.compiler.set_stance("default")
    logging.getLogger(_MCORE_RANDOM).removeFilter(_shared_generator)


def _replace(owner: Any, name: str, new: Any) -> None:
    _undo.append((owner, name, getattr(owner, name, None), name in vars(owner)))
    setattr(owner, name, new)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _map_devices(device: torch.device) -> None:
    # parallel layers, mappings, p2p buffers, routers, DDP buffers: device=torch.cuda.current_device()
    _replace(torch.cuda, "current_device", lambda: device)
    # dist_checkpointing/strategies/async_utils.py pins its writer to a device
    _replace(torch.cuda, "set_device", lambda device: None)
    # p2p_communication.py after each batch of messages, timers.py, dist_checkpointing/strategies/fully_parallel.py
    _replace(torch.cuda, "synchronize", lambda device=None: None)


def _map_streams() -> None:
    # distributed_data_parallel.py, moe/token_dispatcher.py, moe/shared_experts.py create and enter streams
    _replace(torch.cuda, "Stream", Stream)
    _replace(torch.cuda, "Event", Event)
    _replace(torch.cuda, "current_stream", lambda device=None: Stream())
    _replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def _map_random_state() -> None:
    # tensor_parallel/random.py keeps one state per name and swaps it into the device's generator: here the CPU's.
    def get_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(new_state)

    for module in (torch.cuda, torch.cuda.random):
        _replace(module, "get_rng_state", get_state)
        _replace(module, "set_rng_state", set_state)
        _replace(module, "manual_seed", lambda seed: torch.default_generator.manual_seed(int(seed)))
    # _set_cuda_rng_state indexes the generators with current_device() inside _lazy_call, which would queue the call until
    # CUDA starts, that is forever.
    _replace(torch.cuda, "default_generators", _EveryIndex(torch.default_generator))
    mcore_random = importlib.import_module(_MCORE_RANDOM)
    _replace(mcore_random, "_lazy_call", _call_now)
    # CheckpointWithoutOutput (selective recomputation of mla_up_proj, layernorm, moe_act) compiles a C++ extension when it
    # first runs: two minutes and a compiler, to save one copy.
    _replace(mcore_random, "_get_share_storage", lambda: _copy_storage)


def _call_now(call: Callable[[], None], **kwargs: Any) -> None:
    call()


def _copy_storage(to: torch.Tensor, source: torch.Tensor) -> None:
    storage = source.untyped_storage()
    to.untyped_storage().resize_(storage.nbytes())
    to.untyped_storage().copy_(storage)


class _EveryIndex:
    """Answers every index with the same generator."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def __getitem__(self, index: Any) -> torch.Generator:
        return self.generator


def _map_factories(device: torch.device) -> None:
    def mapped(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = device
            kwargs.pop("pin_memory", None)  # pinning needs a CUDA driver
            return factory(*args, **kwargs)

        return call

    for name in _FACTORIES:
        _replace(torch, name, mapped(getattr(torch, name)))


def _map_tensor_methods(device: torch.device) -> None:
    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (device, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = device
        return original_to(self, *args, **kwargs)

    def cuda(self: torch.Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:
        return original_to(self, _target)

    @functools.wraps(original_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        if isinstance(result, str) and self.device.type == device.type:
            return f"torch.cuda.{result.rsplit('.', 1)[1]}"
        return result

    # optimizer/cpu_offloading, grad_scaler.load_state_dict, router.py and rotary embeddings move tensors
    _replace(torch.Tensor, "to", to)
    # rope_utils.py (the zigzag index), language_module.py, exchange_utils.py
    _replace(torch.Tensor, "cuda", cuda)
    # optimizer.py, distrib_optimizer.py and clip_grads.py compare it with "torch.cuda.FloatTensor" and refuse others
    _replace(torch.Tensor, "type", type_)


def _map_collectives() -> None:
    # tensor_parallel/mappings.py (_AllToAll) passes the dispatcher's split sizes, which are tensors unless they had to be
    # copied from a GPU.
    _replace(dist, "all_to_all_single", _with_sizes_as_ints(dist.all_to_all_single))
    # finalize_model_grads.py averages replicated gradients over TP, moe_logging.py its losses. gloo learnt AVG only in
    # recent torch.
    _replace(dist, "all_reduce", _with_average(dist.all_reduce))
    # tensor_parallel/mappings.py gathers and scatters over expert-TP ranks that hold different numbers of tokens
    # (token_dispatcher.py). gloo wants equal parts, so the parts are padded to the longest.
    _replace(dist, "all_gather", _with_uneven_parts_gathered(dist.all_gather))
    _replace(dist, "reduce_scatter", _with_uneven_parts_scattered(dist.reduce_scatter))


def _with_sizes_as_ints(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_to_all_single(
        output: torch.Tensor, input: torch.Tensor, output_split_sizes=None, input_split_sizes=None, *args, **kwargs
    ) -> Any:
        return original(output, input, _as_ints(output_split_sizes), _as_ints(input_split_sizes), *args, **kwargs)

    return all_to_all_single


def _with_average(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM, group=None, async_op: bool = False) -> Any:
        if op != dist.ReduceOp.AVG:
            return original(tensor, op, group, async_op)
        if async_op:
            raise NotImplementedError(
                "an asynchronous average has no counterpart on gloo; ddp.average_in_collective=False"
            )
        original(tensor, dist.ReduceOp.SUM, group)
        tensor.div_(dist.get_world_size(group))
        return None

    return all_reduce


def _with_uneven_parts_gathered(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group=None, async_op: bool = False) -> Any:
        if async_op or _are_even(tensor_list):
            return original(tensor_list, tensor, group, async_op)
        longest = max(part.shape[0] for part in tensor_list)
        padded = [tensor.new_empty(longest, *tensor.shape[1:]) for _ in tensor_list]
        original(padded, _padded(tensor, longest), group)
        for part, whole in zip(tensor_list, padded, strict=True):
            part.copy_(whole[: part.shape[0]])
        return None

    return all_gather


def _with_uneven_parts_scattered(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce_scatter(
        output: torch.Tensor, input_list: list[torch.Tensor], op=dist.ReduceOp.SUM, group=None, async_op: bool = False
    ) -> Any:
        if async_op or _are_even(input_list):
            return original(output, input_list, op, group, async_op)
        longest = max(part.shape[0] for part in input_list)
        padded = output.new_empty(longest, *output.shape[1:])
        original(padded, [_padded(part, longest) for part in input_list], op, group)
        output.copy_(padded[: output.shape[0]])
        return None

    return reduce_scatter


def _are_even(parts: list[torch.Tensor]) -> bool:
    return len({part.shape for part in parts}) == 1


def _padded(part: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([part, part.new_zeros(rows - part.shape[0], *part.shape[1:])])


def _as_ints(sizes: Any) -> list[int] | None:
    return None if sizes is None else [int(size) for size in sizes]
