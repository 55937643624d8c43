"""One optimizer step against Megatron-Core's own path on the same machine.

    python -m benchmarks.step                         # dense, s = 1024, D = 0, 1, 2; about 8 minutes on two cores
    python -m benchmarks.step --kind moe --seq 1024 --depths 1 --json step.json

Three sides take turns, each in a process of its own, on the same tokens: this package; Megatron-Core's local modules
with its schedule, its MTP layers, its MTP loss and its optimizer; and the same with the core attention alone replaced
by torch's `scaled_dot_product_attention`. "ours, glibc's memory" is this package without `device/host_memory.py`.
Printed are medians with their intervals, the share of the speed of a matrix product that takes its turn with them (by
operations of forward and backward pass without recomputation), and each process's peak of resident memory. What MTP
costs is measured by `python -m benchmarks.mtp_cost`.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import in_turn_with_product, machine, parser, write_results
from megatron_mtp.config import ConfigContainer
from megatron_mtp.device.memory_meter import peak_resident_bytes

SIDES = ("ours", "ours, glibc's memory", "engine", "engine, sdpa")
KINDS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "moe": ("model.num_moe_experts=8", "model.moe_router_topk=2", "model.moe_ffn_hidden_size=1536"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config(kind: str, seq: int, depths: int, dtype: str, layers: int) -> ConfigContainer:
    """h 512, 8 layers, v 32768, SwiGLU 1536, 8 heads in 4 groups, micro-batch 1, mock data."""
    from megatron_mtp.config.overrides import apply_overrides
    from megatron_mtp.recipes import get_recipe

    cfg = get_recipe("tiny_dense" if kind == "dense" else "tiny_moe")
    fields = {
        "model.num_layers": layers,
        "model.hidden_size": 512,
        "model.ffn_hidden_size": 1536,
        "model.num_attention_heads": 8,
        "model.num_query_groups": 4,
        "model.vocab_size": 32768,
        "model.seq_length": seq,
        "model.mtp_num_layers": depths,
        "train.micro_batch_size": 1,
        "train.global_batch_size": 1,
        "precision.dtype": dtype,
        "dist.device": "cpu",
        "validation.eval_iters": 0,
        "dataset.prefetch_steps": 0,
    }
    apply_overrides(cfg, [f"{name}={value}" for name, value in fields.items()] + list(KINDS[kind]))
    return cfg.finalize(1)


def head_size(options: argparse.Namespace) -> tuple[torch.dtype, int, int, int]:
    """The product of hidden states and the head, for `in_turn_with_product`."""
    return DTYPES[options.dtype], options.seq, 512, 32768


class Sides:
    """The sides of one config, in this process."""

    def __init__(self, cfg: ConfigContainer, threads: int):
        from megatron_mtp.parallel.resolve import resolve
        from megatron_mtp.training.setup import setup

        self.cfg = cfg
        self.run = setup(resolve(cfg, 1))
        torch.set_num_threads(threads)  # after the job was joined, which sets it by the config
        self.batch = next(self.run.data.train(0))
        self.factor = self.run.resolved.loss_factor.at(0)

    def make(self, name: str) -> Callable[[], float]:
        """A function that does one step of a side and returns its main loss."""
        from megatron_mtp.device.host_memory import keep_freed_memory

        if name == "ours":
            keep_freed_memory()  # as a run does
        if name.startswith("ours"):
            return lambda: self.run.engine.train(self.batch, self.factor).losses[0]
        step = engine_step(self, with_sdpa=name == "engine, sdpa")
        self.run.drop()  # its memory is not this side's
        return step


class PlainSDPA(torch.nn.Module):
    """Causal attention by one call of torch, in the place of Megatron-Core's core attention."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[s, b, heads, width] each -> [s, b, heads * width]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)


def engine_step(sides: Sides, *, with_sdpa: bool) -> Callable[[], float]:
    """One step by Megatron-Core alone: its layers, MTP block, loss, schedule and gradient reduction."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from megatron_mtp.model.transformer_config import transformer_config

    MTPLossLoggingHelper.tracker.clear()  # of the class; it may hold the number of depths of an earlier model
    model, groups, batch = sides.cfg.model, sides.run.groups, sides.batch
    fields = transformer_config(sides.run.resolved, use_te=False, device_type="cpu")
    fields.mtp_loss_scaling_factor = sides.factor
    layer = get_gpt_layer_local_spec(num_experts=fields.num_moe_experts, normalization=fields.normalization)
    if with_sdpa:
        layer.submodules.self_attention.submodules.core_attention = PlainSDPA
    chunk = GPTModel(
        fields,
        layer,
        model.vocab_size,
        model.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        mtp_block_spec=get_gpt_mtp_block_spec(fields, layer, False) if model.mtp_num_layers else None,
        pg_collection=groups,
    )
    is_bf16 = fields.params_dtype == torch.bfloat16
    wrapped = Float16Module(fields, chunk) if is_bf16 else chunk
    reduced = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(fields, reduced, wrapped, pg_collection=groups)
    options = OptimizerConfig(
        lr=sides.cfg.optimizer.lr,
        clip_grad=sides.cfg.optimizer.clip_grad,
        bf16=is_bf16,
        params_dtype=fields.params_dtype,
    )
    optimizer = get_megatron_optimizer(options, [ddp], use_gloo_process_groups=False, pg_collection=groups)
    fields.grad_scale_func, fields.finalize_model_grads_func = optimizer.scale_loss, finalize_model_grads
    micro = batch.micro_batches[0]
    labels, mask = micro.labels[0], micro.loss_mask[0]

    def forward_step(_: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        losses = model(micro.tokens, micro.position_ids, None, labels=labels, loss_mask=mask)

        def loss(per_token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            mean = (per_token.float() * mask).sum() / mask.sum()
            return mean, {"loss": mean.detach()}

        return losses, loss

    def step() -> float:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        found = get_forward_backward_func(1, None)(
            forward_step_func=forward_step,
            data_iterator=None,
            model=ddp,
            num_microbatches=1,
            seq_length=model.seq_length,
            micro_batch_size=1,
            forward_only=False,
            pg_collection=groups,
        )
        optimizer.step()
        return float(found[0]["loss"])

    return step


class SideProcess:
    """One side in a process of its own; calling it does one step there."""

    def __init__(self, side: str, arguments: tuple[Any, ...], threads: int):
        self._pipe, other = multiprocessing.get_context("spawn").Pipe()
        made = multiprocessing.get_context("spawn").Process(target=_serve, args=(other, side, arguments, threads))
        self._process = made
        made.start()
        other.close()
        self._pipe.recv()

    def __call__(self) -> float:
        """Does a step and returns its main loss."""
        self._pipe.send("step")
        return self._pipe.recv()

    def close(self) -> float:
        """Ends the process and returns its peak of resident memory in GiB."""
        self._pipe.send("end")
        peak = self._pipe.recv()
        self._process.join()
        return peak


def _serve(pipe: Any, side: str, arguments: tuple[Any, ...], threads: int) -> None:
    _silence()
    step = Sides(config(*arguments), threads).make(side)
    pipe.send("ready")
    while pipe.recv() == "step":
        pipe.send(step())
    pipe.send(peak_resident_bytes() / 2**30)


def _silence() -> None:
    warnings.filterwarnings("ignore")  # Megatron-Core's, about packages that none of the sides needs
    logging.getLogger("megatron").setLevel(logging.ERROR)


def measure(options: argparse.Namespace, depths: int) -> dict[str, Any]:
    """Timings and memory of all sides at one number of depths."""
    from megatron_mtp.training.throughput import Throughput

    arguments = (options.kind, options.seq, depths, options.dtype, options.layers)
    steps = {name: SideProcess(name, arguments, options.threads) for name in options.sides}
    timings, speed = in_turn_with_product(steps, options.rounds, head_size(options))
    peaks = {name: step.close() for name, step in steps.items()}
    flops = Throughput.of(config(*arguments), 1, "cpu").flops(1)
    return {"depths": depths, "gflop": flops / 1e9, "product_gflops": speed, "peak_gib": peaks, "timings": timings}


def main() -> None:
    """Prints a table and, with --json, writes all results."""
    options = _parse()
    _silence()
    torch.set_num_threads(options.threads)
    described = machine(options.threads)
    print(f"{described['processor']} {described['vector']}, {options.threads} threads, {options.dtype}")
    print(f"{options.kind}, s {options.seq}; s per step: median [interval]; share of the product's speed; peak GiB")
    results = []
    for depths in options.depths:
        found = measure(options, depths)
        results.append(found)
        speed = found["product_gflops"]
        print(f"D={depths}: a product runs at {speed:.0f} GFLOP/s")
        for name, timing in found["timings"].items():
            share = found["gflop"] / timing.median / speed
            peak = f"{found['peak_gib'][name]:5.2f}"
            interval = f"[{timing.low:.3f}, {timing.high:.3f}]"
            print(f"D={depths}  {name:<21} {timing.median:7.3f} {interval:<16} {share:6.1%} {peak}", flush=True)
    write_results("step", options, described, {"depths": results})


def _parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--kind", choices=KINDS, default="dense")
    made.add_argument("--seq", type=int, default=1024)
    made.add_argument("--depths", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--dtype", choices=DTYPES, default="fp32")
    made.add_argument("--layers", type=int, default=8)
    made.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    return made.parse_args()


if __name__ == "__main__":
    main()
