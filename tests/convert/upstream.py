"""Models of Megatron-Core's own classes and specs, saved and loaded with its own `dist_checkpointing`."""

from __future__ import annotations

import multiprocessing
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.model.torch_backend.tiny import RUNTIME

VOCAB, PADDED, SEQ, DEPTHS = 100, 128, 12, 2
DENSE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "add_bias_linear": False,
    "qk_layernorm": True,
    "gated_linear_unit": True,
    "mtp_num_layers": DEPTHS,
}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp32",
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_load_balancing_type": "none",
}
KINDS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "tied": DENSE | {"num_query_groups": 4, "qk_layernorm": False},
    "moe": DENSE | EXPERTS,
    "moe_and_dense": DENSE | EXPERTS | {"moe_layer_freq": [0, 1, 1]},
}


def arguments(kind: str, **changes: Any) -> Namespace:
    """Megatron-LM's arguments for such a model, as its `save_checkpoint` stores them."""
    renamed = {"layernorm_epsilon": "norm_epsilon", "num_moe_experts": "num_experts", "gated_linear_unit": "swiglu"}
    own = {renamed.get(name, name): value for name, value in KINDS[kind].items()}
    common = {
        "untie_embeddings_and_output_weights": kind != "tied",
        "group_query_attention": kind != "tied",
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "vocab_size": VOCAB,
        "padded_vocab_size": PADDED,
        "make_vocab_size_divisible_by": 128,
        "seq_length": SEQ,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "consumed_train_samples": 48,
        "data_path": Path("web"),
        "iteration": 6,
    }
    return Namespace(**(own | common | changes))


def build(kind: str) -> Any:
    """GPTModel with the local spec and its MTP block, random weights, norms that are not 1."""
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(**(KINDS[kind] | RUNTIME))
    layers = specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    torch.manual_seed(3)
    model = GPTModel(
        config,
        layers,
        PADDED,
        SEQ,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=kind == "tied",
        mtp_block_spec=specs.get_gpt_mtp_block_spec(config, layers, use_transformer_engine=False),
    )
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and (tensor.dim() > 1 or "expert_bias" in name or "norm" in name):
                drawn = torch.randn(tensor.shape, generator=draw) * 0.1
                tensor.copy_(drawn + 1 if "norm" in name and tensor.dim() == 1 else drawn)
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """[1 + D, b, s, v]: the hidden states of its MTP block under its output layer."""
    states: list[Tensor] = []
    hook = model.mtp.register_forward_hook(lambda _, __, output: states.append(output))
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    model(ids, torch.arange(ids.shape[1]).expand_as(ids), mask)
    hook.remove()
    weight = model.embedding.word_embeddings.weight if model.share_embeddings_and_output_weights else None
    weight = model.output_layer.weight if weight is None else weight
    logits = torch.stack(states[0].chunk(1 + DEPTHS, dim=0)) @ weight.T  # [1 + D, s, b, v]
    return logits[..., :VOCAB].transpose(1, 2)


@contextmanager
def may_have_children() -> Iterator[None]:
    """Megatron-Core's writer starts processes, which ranks of a pool, being daemons, may not.

    One of them, which holds its queue of results, would outlive the rank; here it ends.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # there is no public setter
    before = config.get("daemon")
    config["daemon"] = False
    try:
        yield
    finally:
        config["daemon"] = before
        filesystem_async._results_queue = None  # the next save starts another
        for child in multiprocessing.active_children():
            child.terminate()
            child.join()


def in_groups(work: Any, *given: Any) -> Any:
    """Runs `work` inside Megatron-Core's process groups of one rank."""
    from megatron_mtp.device import cpu_facade
    from megatron_mtp.mcore.groups import destroy_model_parallel, init_model_parallel, seed_dropout

    if cpu_facade.installed() is None:
        cpu_facade.install("cpu")
    init_model_parallel(tp=1, pp=1, vp=None, cp=1, ep=1, etp=1, embedding_stages=[0])
    try:
        seed_dropout(1, pp_rank=0)
        return work(*given)
    finally:
        destroy_model_parallel()


def save(kind: str, run: str, ids: Tensor, common: dict[str, Any]) -> Tensor:
    """Saves a model as Megatron-LM does, at iteration 6. Returns its logits."""
    return in_groups(_save, kind, run, ids, common)


def _save(kind: str, run: str, ids: Tensor, common: dict[str, Any]) -> Tensor:
    from megatron.core import dist_checkpointing

    model = build(kind)
    folder = Path(run) / "iter_0000006"
    folder.mkdir(parents=True)
    with may_have_children():
        dist_checkpointing.save({"model": model.sharded_state_dict(), **common}, str(folder))
    (Path(run) / "latest_checkpointed_iteration.txt").write_text("6")
    return logits_of(model, ids)


def load(kind: str, folder: str, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Loads a checkpoint into such a model with Megatron-Core's loader: (logits, common state)."""
    return in_groups(_load, kind, folder, ids)


def _load(kind: str, folder: str, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    from megatron.core import dist_checkpointing

    model = build(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    wanted = model.sharded_state_dict()
    without = {key: shard for key, shard in wanted.items() if not key.endswith("_extra_state")}  # of FP8, not written
    state = dist_checkpointing.load({"model": without}, folder)
    odd = model.load_state_dict(state["model"], strict=False)
    assert not odd.unexpected_keys
    assert all(key.endswith("_extra_state") for key in odd.missing_keys)
    common = {name: value for name, value in state.items() if name != "model"}
    return logits_of(model, ids), common


def settings(kind: str, folder: str | None = None) -> Any:
    """Our config of such a run: constant rates, three samples a step; finalized for one rank."""
    from megatron_mtp.convert.megatron_config import model_from_megatron
    from megatron_mtp.recipes.common import pretrain_common

    cfg = pretrain_common()
    cfg.model = model_from_megatron(vars(arguments(kind)))
    cfg.precision.dtype = "fp32"
    cfg.optimizer.update(lr=1e-2, min_lr=1e-2, clip_grad=0.0, weight_decay=0.1)
    cfg.scheduler.update(lr_warmup_iters=0)
    cfg.train.update(train_iters=20, global_batch_size=8, micro_batch_size=1)
    cfg.checkpoint.update(load=folder)
    cfg.dataset.mock = True
    cfg.dist.update(device="cpu", num_threads=1)
    return cfg.finalize(1)


def train(kind: str, run: str, save_at: int, steps: int) -> dict[str, Tensor]:
    """Trains Megatron-Core's model with its optimizer and drawn gradients; saves as Megatron-LM does on the way."""
    return in_groups(_train, kind, run, save_at, steps)


def _train(kind: str, run: str, save_at: int, steps: int) -> dict[str, Tensor]:
    from megatron.core import dist_checkpointing
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mtp.parallel.resolve import resolve
    from megatron_mtp.training.optimizer import apply_schedules, build_optimizer, wrap_model
    from tests.checkpoint.rig import draw_gradients

    resolved = resolve(settings(kind), 1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    wrapped = wrap_model(resolved.cfg, [build(kind)], groups, torch.device("cpu"))
    optimizer = build_optimizer(resolved.cfg, wrapped, groups)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp_cp,
    }
    for step in range(steps):
        if step == save_at:
            folder = Path(run) / f"iter_{step:07d}"
            folder.mkdir(parents=True)
            state: dict[str, Any] = {"model": wrapped[0].module.sharded_state_dict(metadata=metadata)}
            state["optimizer"] = optimizer.sharded_state_dict(state, metadata=metadata)
            state |= {"args": arguments(kind, consumed_train_samples=8 * step), "iteration": step}
            with may_have_children():
                dist_checkpointing.save(state, str(folder))
            (Path(run) / "latest_checkpointed_iteration.txt").write_text(str(step))
        apply_schedules(optimizer, resolved.learning_rate, resolved.weight_decay, 8 * step)
        draw_gradients(wrapped[0], step)
        optimizer.step()
    return _weights(wrapped)


def go_on(kind: str, run: str, steps: int) -> tuple[int, dict[str, Tensor]]:
    """Resumes such a run here: (iteration it resumed from, weights after `steps` steps in total)."""
    from tests.checkpoint.rig import rig

    with rig(settings(kind, run)) as held:
        assert held.resume()
        start = held.state.iteration
        held.steps(steps - start)
        return start, _weights(held.chunks)


def _weights(chunks: Any) -> dict[str, Tensor]:
    from megatron_mtp.model.sharded import parameter_parts

    def name(part: Any) -> str:
        return part.name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_") + str(part.offset)

    return {name(part): part.data for part in parameter_parts(chunks)}
