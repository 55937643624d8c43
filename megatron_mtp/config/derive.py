"""Fills in values that follow from other values. Each rule is Megatron-Core's unless said otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath

from megatron_mtp.config.problem import problem
from megatron_mtp.config.quantity import parse_quantity
from megatron_mtp.config.sections import ModelConfig, RunConfig
from megatron_mtp.errors import ConfigError, Problem

BYTES_VOCAB_SIZE = 257
"""256 byte values and the end of a document."""
WHEN_NULL = {"mtp_num_layers": 0, "virtual_pipeline_model_parallel_size": 1}
"""What null means in these fields of `model`, whatever the others hold."""
TOKEN_COUNTS = (
    ("train", "train_tokens"),
    ("scheduler", "lr_decay_tokens"),
    ("scheduler", "lr_warmup_tokens"),
    ("scheduler", "lr_wsd_decay_tokens"),
)


def derive(cfg: RunConfig) -> list[Problem]:
    """Fills derived values in place and returns what could not be derived."""
    problems = _derive_model(cfg.model)
    _derive_vocabulary(cfg)
    if cfg.dataset.seq_length is None:
        cfg.dataset.seq_length = cfg.model.seq_length
    if cfg.validation.eval_micro_batch_size is None:
        cfg.validation.eval_micro_batch_size = cfg.train.micro_batch_size
    if cfg.validation.eval_global_batch_size is None:
        cfg.validation.eval_global_batch_size = cfg.train.global_batch_size
    if cfg.logger.wandb_project is not None and not cfg.logger.wandb_exp_name and cfg.checkpoint.save is not None:
        cfg.logger.wandb_exp_name = PurePath(cfg.checkpoint.save).name
    return problems


def _derive_model(model: ModelConfig) -> list[Problem]:
    problems = derive_widths(model)
    for name, value in WHEN_NULL.items():
        if getattr(model, name) is None:
            setattr(model, name, value)
    if model.tensor_model_parallel_size == 1:
        model.sequence_parallel = False  # a shard of one: the same numbers, and Megatron-Core refuses it
    if model.expert_tensor_parallel_size is None:
        model.expert_tensor_parallel_size = model.tensor_model_parallel_size
    if model.pipeline_model_parallel_layout is None:
        model.pipeline_model_parallel_layout = "auto"
    if model.recompute_granularity == "selective" and model.recompute_modules is None:
        model.recompute_modules = ["core_attn"]
    return problems


def derive_widths(model: ModelConfig) -> list[Problem]:
    """Fills the widths of attention and feed-forward blocks in place and returns what could not be derived."""
    problems: list[Problem] = []
    if model.ffn_hidden_size is None:
        model.ffn_hidden_size = 4 * model.hidden_size
    if model.num_query_groups is None:
        model.num_query_groups = model.num_attention_heads
    if model.kv_channels is None and model.num_attention_heads:
        model.kv_channels = model.hidden_size // model.num_attention_heads
        if model.hidden_size % model.num_attention_heads and not model.multi_latent_attention:
            rule = "must be divisible by {model.num_attention_heads=}"
            remedy = "Change one of them, or set model.kv_channels, the width of a head."
            problems.append(problem(model, "model.hidden_size", rule, remedy))
    if model.num_moe_experts is not None and model.moe_ffn_hidden_size is None:
        model.moe_ffn_hidden_size = model.ffn_hidden_size
    if model.mtp_layer_mlp == "dense" and model.mtp_ffn_hidden_size is None:
        model.mtp_ffn_hidden_size = model.ffn_hidden_size
    return problems


def _derive_vocabulary(cfg: RunConfig) -> None:
    """The vocabulary size of tokenizers that need no file; `data.tokenizer` opens the others."""
    tokenizer = cfg.tokenizer
    if tokenizer.tokenizer_type == "null":
        if tokenizer.vocab_size is None:
            tokenizer.vocab_size = cfg.model.vocab_size
        if cfg.model.vocab_size is None:
            cfg.model.vocab_size = tokenizer.vocab_size
    elif tokenizer.tokenizer_type == "bytes" and cfg.model.vocab_size is None:
        cfg.model.vocab_size = BYTES_VOCAB_SIZE


def read_token_counts(cfg: RunConfig) -> list[Problem]:
    """Turns "10B" into a count in place and returns what could not be read."""
    problems = []
    for section_name, name in TOKEN_COUNTS:
        section = getattr(cfg, section_name)
        value = getattr(section, name)
        try:
            if isinstance(value, str):
                setattr(section, name, parse_quantity(value))
        except ConfigError as error:
            problems += [replace(found, fields=(f"{section_name}.{name}",)) for found in error.problems]
            setattr(section, name, 0 if name == "lr_warmup_tokens" else None)
    return problems
