"""Our checkpoints -> `torch_dist` checkpoints that Megatron-LM and Megatron-Bridge start from."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

from megatron_mtp.checkpoint.boxes import BoxWriter
from megatron_mtp.checkpoint.directory import LATEST_NAME
from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.checkpoint.train_state import read_train_state
from megatron_mtp.checkpoint.writer import write_metadata
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.convert.megatron_config import megatron_args
from megatron_mtp.convert.new_folder import check_new_folder, new_folder
from megatron_mtp.convert.report import Report
from megatron_mtp.convert.tensor_forms import finite
from megatron_mtp.errors import ConversionError
from megatron_mtp.parallel.params import padded_vocab_size
from megatron_mtp.storage.place import Place, write_durably

Spec = Literal["te", "local"]
"""Which layer specs read the checkpoint: Transformer Engine's, or Megatron-Core's local ones."""
RELEASE = "release"
"""Folder of a checkpoint that Megatron-LM starts from at iteration 0, without optimizer and random state."""


def export_megatron(checkpoint: str | Place, out_dir: str | Path, *, spec: Spec = "te", verify: bool = True) -> Report:
    """Writes the weights of a checkpoint as a run directory of Megatron-LM.

    Args:
        checkpoint: run directory (its newest checkpoint), or the folder of one checkpoint.
        out_dir: folder to create; if it exists it must be empty.
        spec: names of the norms that Transformer Engine fuses with the layer behind them.
        verify: first compare every byte of the checkpoint with its manifest.

    Raises:
        ConversionError, CheckpointError: names everything that does not fit; nothing is left behind.
    """
    target = check_new_folder(out_dir)
    weights = StoredWeights(checkpoint, verify=verify)
    cfg = weights.config()
    _refuse_unknown(cfg.model)
    report = Report(str(weights.folder), str(target), "megatron torch_dist")
    with new_folder(target) as partial:
        folder = partial / RELEASE
        folder.mkdir()
        _write(weights, cfg, folder, spec, report)
        write_durably(partial / LATEST_NAME, RELEASE.encode())
    return report


def _write(weights: StoredWeights, cfg: ConfigContainer, folder: Path, spec: Spec, report: Report) -> None:
    boxes = BoxWriter(folder)
    try:
        for key in sorted(weights.tensors):
            name = key if spec == "te" else local_name(key, is_latent=cfg.model.multi_latent_attention)
            for offset, size in weights.boxes(key):
                value = finite(weights.read(key, offset, size), key, weights.folder)
                boxes.add(name, weights.shape(key), offset, value)
            report.read.append(key)
            report.written.append(name)
        metadata, written = boxes.finish(_common(weights, cfg))
    finally:
        boxes.close()
    write_metadata(folder, metadata, written)
    report.left_out = [f"{count} of {kind}" for kind, count in weights.left_out.items()]
    report.notes.append(
        "Start from it with --load (Megatron-LM) or checkpoint.pretrained_checkpoint (Megatron-Bridge): weights only, "
        "at iteration 0."
    )


def _common(weights: StoredWeights, cfg: ConfigContainer) -> dict[str, Any]:
    """What Megatron-LM expects beside tensors; plain data, and a Namespace, which its loader knows."""
    train, _ = read_train_state(weights.folder, weights.manifest)
    arguments = megatron_args(cfg.model, padded_vocab_size(cfg.model)) | {
        "consumed_train_samples": train["consumed_samples"],
        "iteration": weights.manifest.iteration,
    }
    return {"args": Namespace(**arguments), "checkpoint_version": 3.0, "iteration": weights.manifest.iteration}


def local_name(key: str, *, is_latent: bool) -> str:
    """A key as Megatron-Core's local spec names it.

    >>> local_name("decoder.layers.pre_mlp_layernorm.weight", is_latent=False)
    'decoder.layers.mlp.linear_fc1.layer_norm_weight'
    """
    renamed: tuple[tuple[str, str], ...]
    if is_latent:
        renamed = (
            (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
            (".self_attention.linear_q_up_proj.layer_norm_", ".self_attention.q_layernorm."),
            (".self_attention.linear_kv_up_proj.layer_norm_", ".self_attention.kv_layernorm."),
        )
    else:
        renamed = (
            (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
            (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
        )
    for ours, theirs in renamed:
        key = key.replace(ours, theirs)
    return key


def _refuse_unknown(model: ModelConfig) -> None:
    """Raises ConversionError for what Megatron-Core's own classes do not compute."""
    wrong = []
    if model.mtp_num_layers and model.mtp_variant != "sequential":
        wrong.append(f"model.mtp_variant = {model.mtp_variant!r}: Megatron-Core has sequential MTP layers only.")
    if model.mtp_num_layers and model.mtp_hidden_source != "post_final_norm":
        wrong.append(
            f"model.mtp_hidden_source = {model.mtp_hidden_source!r}: Megatron-Core's MTP layers read the hidden state "
            "after the final norm."
        )
    if model.mtp_num_layers and model.mtp_layer_mlp is not None:
        wrong.append(
            f"model.mtp_layer_mlp = {model.mtp_layer_mlp!r}: Megatron-Core's MTP layers are copies of the last decoder "
            "layer's kind."
        )
    if model.multi_latent_attention and model.latent_norm_epsilon not in (None, model.layernorm_epsilon):
        wrong.append(
            f"model.latent_norm_epsilon = {model.latent_norm_epsilon}: Megatron-Core has one epsilon for all norms, "
            f"layernorm_epsilon = {model.layernorm_epsilon}."
        )
    if wrong:
        raise ConversionError("\n".join(wrong))
