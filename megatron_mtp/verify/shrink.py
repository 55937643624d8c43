"""Shrinks a recipe to a size that this machine can run at every requested layout, with the same layers and losses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.filled import filled
from megatron_mtp.config.knob import resume_rule
from megatron_mtp.config.sections import (
    CheckpointConfig,
    DatasetConfig,
    LoggerConfig,
    ModelConfig,
    ProfilingConfig,
    SchedulerConfig,
    TokenizerConfig,
)
from megatron_mtp.errors import ConfigError
from megatron_mtp.parallel.params import linear_pattern, moe_pattern
from megatron_mtp.verify.placements import Placement

HIDDEN_SIZE, FFN_SIZE, EXPERT_FFN_SIZE, SHARED_FFN_SIZE, MTP_FFN_SIZE = 32, 48, 16, 24, 40
HEAD_SIZE, SEQ_LENGTH, VOCAB_SIZE, NUM_LAYERS, NUM_EXPERTS = 8, 32, 101, 4, 8
MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE = 2, 8
INIT_STD = 0.1


def shrink(cfg: ConfigContainer, layouts: list[Placement]) -> tuple[ConfigContainer, list[str]]:
    """Returns the one-rank config that every layout starts from, and the changes as "field old -> new".

    Kept: depths and all of MTP's fields, the order of dense and expert layers, attention's kind, router, norms, losses,
    tying, recomputation. Data, checkpoints and logs are left out.

    Args:
        cfg: a recipe with the user's changes, not finalized.
        layouts: the sizes to divide by.

    Raises:
        ConfigError: the recipe is invalid, or hand-written layouts hold different numbers of layers.
    """
    full = cfg.copy().finalize()
    small = Placement.parse("").place(full)
    sizes = _Sizes(layouts)
    _shrink_run(small, full, sizes)
    _shrink_model(small.model, moe_pattern(full.model), linear_pattern(full.model), sizes)
    return small, _changes(full, small)


class _Sizes:
    """The numbers that must divide the shrunk sizes."""

    def __init__(self, layouts: list[Placement]):
        self.layouts = layouts
        self.tp, self.ep = math.lcm(*self._all("tp")), math.lcm(*self._all("ep"))
        self.etp = math.lcm(*(layout.values.get("etp", layout.values.get("tp", 1)) for layout in layouts))
        self.slots = math.lcm(*(2 * layout.values.get("cp", 1) * layout.values.get("tp", 1) for layout in layouts))
        self.micro_batch_size = MICRO_BATCH_SIZE
        self.global_batch_size = _multiple(GLOBAL_BATCH_SIZE, math.lcm(*map(self._batch_unit, layouts)))

    def _all(self, key: str) -> Iterable[int]:
        return (layout.values.get(key, 1) for layout in self.layouts)

    def _batch_unit(self, layout: Placement) -> int:
        """What a layout's global batch is a multiple of."""
        values, num_ranks = layout.values, layout.world_size(layout.place(ConfigContainer()))
        dp = num_ranks // (values.get("tp", 1) * values.get("cp", 1) * values.get("pp", 1))
        rounds = values.get("pp", 1) if values.get("vp", 1) > 1 else 1
        return values.get("mbs", self.micro_batch_size) * dp * rounds

    def num_layers(self, of_recipe: int) -> int:
        """The smallest number that fills every chunk, or that of a hand-written layout."""
        written = {layout.values["layout"].count("t") for layout in self.layouts if "layout" in layout.values}
        if len(written) > 1:
            raise ConfigError(
                f"--layouts: the hand-written layouts hold {', '.join(map(str, sorted(written)))} decoder layers (t). "
                "One reference serves all layouts: give each the same number."
            )
        chunks = max(layout.values.get("pp", 1) * layout.values.get("vp", 1) for layout in self.layouts)
        return max(written, default=max(min(of_recipe, NUM_LAYERS), chunks))


def _shrink_run(small: ConfigContainer, full: ConfigContainer, sizes: _Sizes) -> None:
    small.dataset = DatasetConfig(
        mock=True,
        reset_attention_mask=full.dataset.reset_attention_mask,
        reset_position_ids=full.dataset.reset_position_ids,
    )
    small.tokenizer = TokenizerConfig(tokenizer_type="null")
    small.checkpoint, small.logger, small.profiling = CheckpointConfig(), LoggerConfig(), ProfilingConfig()
    small.scheduler = SchedulerConfig()
    small.validation.eval_iters, small.validation.eval_interval = 0, None
    small.validation.update(eval_micro_batch_size=None, eval_global_batch_size=None)
    small.train.train_iters, small.train.train_samples, small.train.train_tokens = 1, None, None
    small.train.rampup_batch_size = None
    small.phases = {}  # `phase_of` has chosen one
    small.train.micro_batch_size = sizes.micro_batch_size
    small.train.global_batch_size = sizes.global_batch_size
    small.optimizer.optimizer = "adam"
    small.precision.dtype = "fp32"
    small.dist.device, small.dist.num_threads = "cpu", 1


def _shrink_model(model: ModelConfig, is_moe: list[bool], is_linear: list[bool], sizes: _Sizes) -> None:
    num_layers = sizes.num_layers(model.num_layers)
    model.hidden_size = _multiple(HIDDEN_SIZE, sizes.tp)
    model.ffn_hidden_size = _multiple(FFN_SIZE, sizes.tp)
    _shrink_attention(model, sizes)
    if model.num_moe_experts:
        _shrink_experts(model, sizes)
        model.moe_layer_freq = [int(kind) for kind in _fewer(is_moe, num_layers)]
    if model.experimental_attention_variant is not None:
        _shrink_linear_attention(model, sizes)
        model.linear_attention_freq = [int(kind) for kind in _fewer(is_linear, num_layers)]
    model.num_layers = num_layers
    model.seq_length = _multiple(max(SEQ_LENGTH, 2 * model.mtp_num_layers), sizes.slots)
    model.vocab_size, model.make_vocab_size_divisible_by = VOCAB_SIZE, 8
    model.init_method_std = INIT_STD  # larger, so that every part of the model has a clear gradient
    model.attention_dropout = model.hidden_dropout = 0.0
    model.backend = "torch"
    if model.recompute_num_layers is not None:
        model.recompute_num_layers = 1


def _shrink_attention(model: ModelConfig, sizes: _Sizes) -> None:
    ratio = min(2, model.num_attention_heads // model.num_query_groups)
    groups = min(model.num_query_groups, math.lcm(sizes.tp, 2))
    model.num_attention_heads = math.lcm(groups * ratio, sizes.tp)
    model.num_query_groups = groups
    model.kv_channels = HEAD_SIZE
    if not model.multi_latent_attention:
        return
    model.num_query_groups = model.num_attention_heads
    model.update(kv_channels=None)
    model.q_lora_rank = None if model.q_lora_rank is None else _multiple(12, sizes.tp)
    model.qk_pos_emb_head_dim = 4
    model.kv_lora_rank = _multiple(12, sizes.tp) - model.qk_pos_emb_head_dim
    model.qk_head_dim, model.v_head_dim = 8, 6


def _shrink_linear_attention(model: ModelConfig, sizes: _Sizes) -> None:
    ratio = min(2, model.linear_num_value_heads // model.linear_num_key_heads)
    shards = math.lcm(*(layout.values.get("tp", 1) * layout.values.get("cp", 1) for layout in sizes.layouts))
    model.linear_num_key_heads = _multiple(2, shards)
    model.linear_num_value_heads = ratio * model.linear_num_key_heads
    model.linear_key_head_dim, model.linear_value_head_dim = HEAD_SIZE, 6


def _shrink_experts(model: ModelConfig, sizes: _Sizes) -> None:
    groups = model.moe_router_num_groups
    if groups is not None:
        model.moe_router_num_groups = groups = min(groups, 4)
        model.moe_router_group_topk = min(filled(model.moe_router_group_topk), max(1, groups // 2))
    num_experts = _multiple(NUM_EXPERTS, math.lcm(sizes.ep, groups or 1))
    model.num_moe_experts = num_experts
    model.moe_router_topk = max(min(model.moe_router_topk, num_experts // 4), model.moe_router_group_topk or 0)
    model.moe_ffn_hidden_size = _multiple(EXPERT_FFN_SIZE, sizes.etp)
    if model.moe_shared_expert_intermediate_size is not None:
        model.moe_shared_expert_intermediate_size = _multiple(SHARED_FFN_SIZE, sizes.tp)
    if model.mtp_layer_mlp == "dense":
        model.mtp_ffn_hidden_size = _multiple(MTP_FFN_SIZE, sizes.tp)
    model.moe_grouped_gemm = None
    model.moe_expert_capacity_factor = None  # dropped tokens depend on the layout by definition


def _fewer(pattern: list[bool], num_layers: int) -> list[bool]:
    """Thins `pattern` out to `num_layers` kinds in the same order, with both ends and every kind kept."""
    if num_layers == 1:
        return pattern[-1:]
    last = len(pattern) - 1
    kinds = [pattern[idx * last // (num_layers - 1)] for idx in range(num_layers)]
    if len(set(kinds)) < len(set(pattern)):
        kinds[0] = not kinds[-1]
    return kinds


def _multiple(value: int, of: int) -> int:
    return math.ceil(value / of) * of


def _changes(full: ConfigContainer, small: ConfigContainer) -> list[str]:
    after = small.copy().finalize()  # with derived values, as `full` has them
    # A field that a resume may change freely does not change the result, except the size of the initial weights.
    reported = [f.name for f in fields(ModelConfig) if resume_rule(ModelConfig, f.name) != "free"]
    names = [*reported, "init_method_std"]
    pairs = [(name, getattr(full.model, name), getattr(after.model, name)) for name in names]
    pairs += [
        ("precision.dtype", full.precision.dtype, after.precision.dtype),
        ("train.micro_batch_size", full.train.micro_batch_size, after.train.micro_batch_size),
        ("train.global_batch_size", full.train.global_batch_size, after.train.global_batch_size),
    ]
    return [f"{name} {_short(old)} -> {_short(new)}" for name, old, new in pairs if old != new]


def _short(value: Any) -> str:
    return f"({len(value)} layers)" if isinstance(value, list) and len(value) > 8 else str(value)
