"""Each replacement does what Megatron-Core expects of it, and goes away again."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist

from megatron_mtp.device import cpu_facade

pytestmark = pytest.mark.unit


@pytest.fixture
def cpu():
    cpu_facade.install("cpu")
    yield torch.device("cpu")
    cpu_facade.uninstall()


@pytest.fixture
def meta():
    torch.utils._device._device_constructors.cache_clear()  # as in a fresh process
    cpu_facade.install("meta")
    yield torch.device("meta")
    cpu_facade.uninstall()


def test_uninstall_puts_everything_back():
    from megatron.core.tensor_parallel import random

    owners = (torch, torch.cuda, torch.cuda.random, torch.Tensor, dist, random)
    before = [dict(vars(owner)) for owner in owners]
    cpu_facade.install("cpu")
    assert any(dict(vars(owner)) != old for owner, old in zip(owners, before, strict=True))
    cpu_facade.uninstall()
    for owner, old in zip(owners, before, strict=True):
        now = dict(vars(owner))
        assert now.keys() == old.keys()
        assert [name for name in old if now[name] is not old[name]] == []


def test_install_is_idempotent(cpu):
    replaced = torch.zeros
    cpu_facade.install("cpu")
    assert torch.zeros is replaced
    assert cpu_facade.installed() == cpu


def test_install_refuses_another_target(cpu):
    with pytest.raises(ValueError, match="already"):
        cpu_facade.install("meta")
    with pytest.raises(ValueError, match="not onto"):
        cpu_facade.install("cuda")


def test_is_available_stays_honest():
    before = torch.cuda.is_available(), torch.cuda.is_initialized()
    cpu_facade.install("cpu")
    try:
        assert (torch.cuda.is_available(), torch.cuda.is_initialized()) == before
    finally:
        cpu_facade.uninstall()


def test_current_device_is_the_target(cpu):
    assert torch.cuda.current_device() == cpu
    assert torch.empty(2, device=torch.cuda.current_device()).device == cpu


def test_set_device_and_synchronize_return(cpu):
    torch.cuda.set_device(3)
    torch.cuda.synchronize()
    assert torch.cuda.current_device() == cpu


def test_streams_do_nothing_and_are_one(cpu):
    stream = torch.cuda.Stream(device="cuda", priority=-1)
    event = stream.record_event()
    stream.wait_stream(torch.cuda.current_stream())
    stream.wait_event(event)
    stream.synchronize()
    assert torch.cuda.Stream.priority_range() == (0, 0)
    assert stream == torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        assert torch.ones(1).item() == 1


def test_events_have_happened(cpu):
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream())
    event.wait()
    event.synchronize()
    assert event.query()


def test_random_state_is_the_cpus(cpu):
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.cuda.random.set_rng_state(torch.cuda.random.get_rng_state(device="cuda"))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


def test_default_generators_answer_any_index(cpu):
    assert torch.cuda.default_generators[torch.cuda.current_device()] is torch.default_generator


def test_lazy_calls_run_at_once(cpu):
    from megatron.core.tensor_parallel import random

    called = []
    random._lazy_call(lambda: called.append(1))
    assert called == [1]


def test_tracker_forks_reproduce_numbers_without_warning(cpu, caplog):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    torch.manual_seed(0)
    outside = torch.rand(1)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING), tracker.fork("a"):
        first = torch.rand(2)
    with tracker.fork("b"):
        other = torch.rand(2)
    assert torch.equal(torch.rand(1), outside)
    with tracker.fork("a"):
        second = torch.rand(2)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([first, second]), expected)
    assert not torch.equal(first, other)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("megatron")] == []


def test_outputs_that_were_dropped_come_back_without_a_compiler(cpu, monkeypatch):
    from megatron.core.tensor_parallel import random

    monkeypatch.setattr(random, "load_inline", None)
    random.initialize_rng_tracker(force_reset=True)
    x = torch.linspace(-1, 1, 6, requires_grad=True)
    checkpoint = random.CheckpointWithoutOutput(fp8=None)
    hidden = checkpoint.checkpoint(torch.exp, x)
    out = hidden.square()
    checkpoint.discard_output_and_register_recompute(out)
    assert hidden.untyped_storage().nbytes() == 0
    out.sum().backward()
    assert torch.allclose(x.grad, 2 * torch.exp(2 * x.detach()))


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: torch.tensor([1, 2], **k),
        lambda **k: torch.empty(2, **k),
        lambda **k: torch.zeros(2, **k),
        lambda **k: torch.ones(2, **k),
        lambda **k: torch.full((2,), 3.0, **k),
        lambda **k: torch.arange(2, **k),
        lambda **k: torch.empty_like(torch.ones(2), **k),
        lambda **k: torch.zeros_like(torch.ones(2), **k),
    ],
    ids=["tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like"],
)
def test_factories_take_cuda(cpu, make):
    for device in ("cuda", "cuda:0", torch.device("cuda"), "cpu", None):
        assert make(device=device).device == cpu


def test_factories_take_pinned_memory(cpu):
    assert torch.tensor([0, 3], device="cpu", pin_memory=True).cuda(non_blocking=True).tolist() == [0, 3]
    assert torch.empty(2, pin_memory=True).shape == (2,)


def test_to_takes_cuda(cpu):
    x = torch.ones(2)
    assert x.to("cuda").device == cpu
    assert x.to(device="cuda", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert x.to(torch.device("cuda"), torch.float64).dtype == torch.float64
    assert x.to(torch.int32).dtype == torch.int32


def test_cuda_moves_to_the_target(cpu):
    assert torch.ones(2).cuda().device == cpu
    assert torch.ones(2).cuda(torch.cuda.current_device()).device == cpu
    assert torch.nn.Linear(2, 2).cuda().weight.device == cpu


def test_type_names_a_cuda_tensor(cpu):
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type(torch.float16).dtype == torch.float16


def test_meta_context_still_works(meta):
    with torch.device("meta"):
        assert torch.zeros(3).device == meta
    assert torch.zeros(3, device="cuda").device == meta
    assert torch.zeros(3).device.type == "cpu"
    assert torch.zeros(3).cuda().device == meta
    assert torch.zeros(3, device="cuda").type() == "torch.cuda.FloatTensor"


def test_compiled_functions_run_as_they_are_written(cpu):
    calls = []

    @torch.compile
    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(type(x))
        return 2 * x

    for _ in range(3):
        assert double(torch.ones(2)).tolist() == [2, 2]
    assert calls == [torch.Tensor] * 3  # compiled, the body would be traced once


def test_the_table_names_what_is_replaced():
    before = {row.owner: dict(vars(row.owner)) for row in cpu_facade.replacements(torch.device("cpu"))}
    cpu_facade.install("cpu")
    changed = {(o, n) for o, old in before.items() for n, value in vars(o).items() if old.get(n) is not value}
    cpu_facade.uninstall()
    rows = cpu_facade.replacements(torch.device("cpu"))
    assert changed == {(row.owner, row.name) for row in rows}
    assert all(row.reason for row in rows)
