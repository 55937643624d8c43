"""Runs Megatron-Core's own schedule for one rank, with computation and messages replaced by records, and returns them.

The schedule function, its order table and its handling of buffers are Megatron-Core's, untouched. Replaced are the two
functions it computes with and the function of its communicator that talks to other ranks.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import schedules, utils
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_mtp.device import cpu_facade
from megatron_mtp.parallel.planner.schedule import Compute, Exchange, Instruction, ScheduleKind, Wait


class _Group:
    def __init__(self, size: int = 1, rank: int = 0):
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


class _Handle:
    """What isend and irecv return."""

    def __init__(self, notes: list, tensor: torch.Tensor):
        self.notes, self.tensor = notes, tensor

    def wait(self) -> None:
        self.notes.append(("wait", self.tensor))


class _Communicator(P2PCommunicator):
    def __init__(self, kind: ScheduleKind, rank: int, config: Any, notes: list):
        self.pp_group, self.config, self.notes = _Group(kind.pp, rank), config, notes
        self.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size

    def _communicate(
        self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, tensor_shape, wait_on_reqs=True
    ):
        from_prev, from_next = (
            torch.zeros(1, requires_grad=True) if wanted else None for wanted in (recv_prev, recv_next)
        )
        sends = [tensor for tensor in (tensor_send_next, tensor_send_prev) if tensor is not None]
        receives = [tensor for tensor in (from_next, from_prev) if tensor is not None]
        if sends or receives:
            self.notes.append(("exchange", sends, receives, wait_on_reqs))
        named = {
            "send_next": tensor_send_next,
            "send_prev": tensor_send_prev,
            "recv_prev": from_prev,
            "recv_next": from_next,
        }
        handles = {name: _Handle(self.notes, tensor) for name, tensor in named.items() if tensor is not None}
        return from_prev, from_next, None if wait_on_reqs else handles


class _Chunk(torch.nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.model_type = ModelType.encoder_or_decoder


def megatron_program(kind: ScheduleKind, rank: int) -> list[Instruction]:
    """The instructions that Megatron-Core's schedule carries out on one rank."""
    notes: list[tuple] = []
    config = _config(kind)
    communicator = _Communicator(kind, rank, config, notes)
    calls = {}  # output tensor -> the call that made it

    def forward(func, data, model, num_microbatches, input_tensor, store, config, *, current_microbatch, **options):
        output = torch.zeros(1, requires_grad=True)
        calls[output] = (options.get("vp_stage") or 0, current_microbatch)
        notes.append(("forward", *calls[output], _single(input_tensor), output))
        return output, 0

    def backward(input_tensor, output_tensor, output_tensor_grad, config):
        gradient = torch.zeros(1)
        notes.append(("backward", *calls[output_tensor], _single(output_tensor_grad), gradient))
        return gradient

    run = (
        schedules.forward_backward_pipelining_without_interleaving
        if kind.vp == 1
        else schedules.forward_backward_pipelining_with_interleaving
    )
    chunks = [_Chunk(config) for _ in range(kind.vp)]
    cpu_facade.install("cpu")
    try:
        with (
            mock.patch.object(schedules, "forward_step", forward),
            mock.patch.object(schedules, "backward_step", backward),
            # Outside torch.distributed these take every group for a group of one.
            mock.patch.object(utils, "get_pg_rank", lambda group: group.rank()),
            mock.patch.object(utils, "get_pg_size", lambda group: group.size()),
            # Frees what a tensor holds; these hold a number, and their identity distinguishes them.
            mock.patch.object(schedules, "deallocate_output_tensor", return_value=None),
        ):
            run(
                forward_step_func=None,
                data_iterator=[None] * kind.vp,
                model=chunks,
                num_microbatches=kind.num_microbatches,
                seq_length=1,
                micro_batch_size=1,
                p2p_communicator=communicator,
                pg_collection=schedules.ProcessGroupCollection(tp=_Group(), cp=_Group()),
            )
    finally:
        cpu_facade.uninstall()
    return _named(kind, rank, notes)


def _single(tensors: Any) -> torch.Tensor | None:
    return tensors[0] if isinstance(tensors, list) else tensors


def _config(kind: ScheduleKind) -> SimpleNamespace:
    """The fields the schedules read, as model/transformer_config.py sets them."""
    config = SimpleNamespace(
        overlap_p2p_comm=kind.vp > 1,
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=kind.sends_block,
        overlap_p2p_comm_warmup_flush=False,
        microbatch_group_size_per_vp_stage=kind.pp,
        virtual_pipeline_model_parallel_size=kind.vp if kind.vp > 1 else None,
        pipeline_model_parallel_size=kind.pp,
        hidden_size=1,
        sequence_parallel=False,
        variable_seq_lengths=False,
        overlap_moe_expert_parallel_comm=False,
    )
    for name in (
        "finalize_model_grads_func timers no_sync_func grad_sync_func param_sync_func "
        "num_microbatches_with_partial_activation_checkpoints"
    ).split():
        setattr(config, name, None)
    return config


def _named(kind: ScheduleKind, rank: int, notes: list[tuple]) -> list[Instruction]:
    """Gives each tensor the name of its message, by the call that made or took it."""
    names: dict[torch.Tensor, tuple[bool, int, int]] = {}
    for note in notes:
        if note[0] in ("forward", "backward"):
            what, v, micro_batch, taken, made = note
            chunk = v * kind.pp + rank
            is_gradient = what == "backward"
            names[made] = (is_gradient, chunk - is_gradient, micro_batch)
            if taken is not None:
                names[taken] = (is_gradient, chunk - (not is_gradient), micro_batch)
    program: list[Instruction] = []
    for note in notes:
        if note[0] == "exchange":
            _, sends, receives, is_blocking = note
            program.append(Exchange(tuple(names[t] for t in sends), tuple(names[t] for t in receives), is_blocking))
        elif note[0] == "wait":
            program.append(Wait(names[note[1]]))
        else:
            program.append(Compute(note[0] == "forward", note[1], note[2]))
    return program
