"""Maps the parts of `torch.cuda` that Megatron-Core 0.19 calls while training onto the CPU or the meta device.

Megatron-Core names "cuda" in its source and asks `torch.cuda` for devices, streams and random states whatever the
backend. `install` replaces the names of `replacements`, `uninstall` puts them back, and nothing is replaced before.
`torch.cuda.is_available` and `torch.cuda.is_initialized` stay honest: every place that asks them in Megatron-Core copes
with False.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.utils._device

from megatron_mtp.mcore.patches import replaced

_MCORE_RANDOM = "megatron.core.tensor_parallel.random"


class Stream:
    """A stream on a device that has only one: nothing runs in parallel, so nothing waits."""

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


class Replacement(NamedTuple):
    """One name of the table.

    Attributes:
        owner: module or class that holds the name.
        reason: the call of Megatron-Core that needs it, below megatron/core, and what is replaced if that is not plain.
    """

    owner: Any
    name: str
    new: Any
    reason: str


def replacements(device: torch.device) -> list[Replacement]:
    """What `install` replaces for a device, with reasons."""
    cuda, mcore_random = torch.cuda, importlib.import_module(_MCORE_RANDOM)
    factories = (
        "device='cuda': schedules.py, optimizer/grad_scaler.py, dist_checkpointing/exchange_utils.py, "
        "transformer/utils.py. pin_memory=True: models/common/embeddings/rope_utils.py. full and arange: upstream's "
        "examples."
    )
    return [
        Replacement(cuda, "current_device", lambda: device, "parallel layers, p2p and DDP buffers name it as device"),
        Replacement(cuda, "set_device", lambda device: None, "dist_checkpointing/strategies/async_utils.py"),
        Replacement(cuda, "synchronize", lambda device=None: None, "p2p_communication.py after each batch of messages"),
        Replacement(cuda, "Stream", Stream, "distributed_data_parallel.py, moe/token_dispatcher.py, shared_experts.py"),
        Replacement(cuda, "Event", Event, "as Stream"),
        Replacement(cuda, "current_stream", lambda device=None: Stream(), "as Stream"),
        Replacement(cuda, "stream", lambda stream: contextlib.nullcontext(), "as Stream"),
        *(
            Replacement(module, name, new, "tensor_parallel/random.py swaps named states in the device's generator")
            for module in (cuda, cuda.random)
            for name, new in _RANDOM_STATE.items()
        ),
        Replacement(
            cuda,
            "default_generators",
            _EveryIndex(torch.default_generator),
            "tensor_parallel/random.py indexes it with current_device()",
        ),
        Replacement(
            mcore_random, "_lazy_call", _call_now, "would queue the call until CUDA starts, which never happens here"
        ),
        Replacement(
            mcore_random,
            "_get_share_storage",
            lambda: _copy_storage,
            "CheckpointWithoutOutput compiles a C++ extension: two minutes and a compiler, to save one copy",
        ),
        *(Replacement(torch, name, _on(device, getattr(torch, name)), factories) for name in _FACTORIES),
        Replacement(torch.Tensor, "to", _to(device), "optimizer/cpu_offloading, grad_scaler.py, router.py, embeddings"),
        Replacement(torch.Tensor, "cuda", _cuda(device), "rope_utils.py, language_module.py, exchange_utils.py"),
        Replacement(
            torch.Tensor,
            "type",
            _type(device),
            "optimizer.py, distrib_optimizer.py and clip_grads.py accept torch.cuda.FloatTensor only",
        ),
        Replacement(
            dist,
            "all_to_all_single",
            _with_sizes_as_ints(dist.all_to_all_single),
            "tensor_parallel/mappings.py passes split sizes as tensors unless they were copied from a GPU",
        ),
        Replacement(
            dist,
            "all_reduce",
            _with_average(dist.all_reduce),
            "finalize_model_grads.py and moe_logging.py average; gloo learnt AVG in recent torch only",
        ),
        Replacement(
            dist,
            "all_gather",
            _with_uneven_parts_gathered(dist.all_gather),
            "tensor_parallel/mappings.py gathers unequal parts over expert-TP ranks; gloo needs equal parts",
        ),
        Replacement(
            dist, "reduce_scatter", _with_uneven_parts_scattered(dist.reduce_scatter), "as all_gather, the other way"
        ),
    ]


class _Facade(NamedTuple):
    """The facade while it is installed: its device, and how to take it away."""

    device: torch.device
    undo: contextlib.ExitStack


_facade: _Facade | None = None


def installed() -> torch.device | None:
    """The device that "cuda" stands for at present, or None if the facade is not installed."""
    return _facade and _facade.device


def install(target: str | torch.device = "cpu") -> None:
    """Makes "cuda" mean `target` for the calls of Megatron-Core. A second call with the same target does nothing.

    Args:
        target: "cpu", or "meta" for a dry run that allocates nothing.

    Raises:
        ValueError: the target is another device, or the facade is installed for the other target.
    """
    global _facade
    device = torch.device(target)
    if device.type not in ("cpu", "meta"):
        raise ValueError(f"the facade maps torch.cuda onto cpu or meta, not onto {device}")
    if _facade is not None:
        if _facade.device != device:
            raise ValueError(f"the facade maps torch.cuda onto {_facade.device} already; uninstall it before {device}")
        return
    # `with torch.device("meta")` looks factories up in a cached set of the original functions. Fill that cache first,
    # or the context manager no longer recognises them.
    torch.utils._device._device_constructors()
    undo = contextlib.ExitStack()
    for owner, name, new, _ in replacements(device):
        undo.enter_context(replaced(owner, **{name: new}))
    # Megatron-Core wraps small functions (router losses, activations) in torch.compile. On a CPU that needs a C++
    # compiler and 20 s at the first step, and fused sums round in another order than the plain ones.
    torch.compiler.set_stance("force_eager")
    undo.callback(torch.compiler.set_stance, "default")
    shared_generator = _SharedGenerator()
    logging.getLogger(_MCORE_RANDOM).addFilter(shared_generator)
    undo.callback(logging.getLogger(_MCORE_RANDOM).removeFilter, shared_generator)
    _facade = _Facade(device, undo)


def uninstall() -> None:
    """Puts everything back as it was. Does nothing where the facade is not installed."""
    global _facade
    if _facade is not None:
        _facade.undo.close()
        _facade = None


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


_RANDOM_STATE: dict[str, Callable[..., Any]] = {
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda new_state, device="cuda": torch.set_rng_state(new_state),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
}


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


_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like")


def _on(device: torch.device, factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = device
        kwargs.pop("pin_memory", None)  # pinning needs a CUDA driver
        return factory(*args, **kwargs)

    return call


def _to(device: torch.device, original: Callable[..., torch.Tensor] = torch.Tensor.to) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (device, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = device
        return original(self, *args, **kwargs)

    return to


def _cuda(device: torch.device, to: Callable[..., torch.Tensor] = torch.Tensor.to) -> Callable[..., torch.Tensor]:
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return to(self, device)

    return cuda


def _type(device: torch.device, original: Callable[..., Any] = torch.Tensor.type) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and self.device.type == device.type:
            return f"torch.cuda.{result.rsplit('.', 1)[1]}"
        return result

    return type_


def _with_sizes_as_ints(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return original(output, input, _as_ints(output_split_sizes), _as_ints(input_split_sizes), *args, **kwargs)

    return all_to_all_single


def _with_average(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
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
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if async_op or _are_even(tensor_list):
            return original(tensor_list, tensor, group, async_op)
        longest = max(part.shape[0] for part in tensor_list)
        padded = [tensor.new_empty(longest, *tensor.shape[1:]) for _ in tensor_list]
        original(padded, _padded(tensor, longest), group)
        for part, received in zip(tensor_list, padded, strict=True):
            part.copy_(received[: part.shape[0]])
        return None

    return all_gather


def _with_uneven_parts_scattered(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
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
