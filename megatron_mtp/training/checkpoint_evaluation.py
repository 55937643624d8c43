"""Evaluates the weights of a checkpoint, at any layout and on any data, as a training run evaluates itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_mtp.checkpoint.directory import checkpoint_folder
from megatron_mtp.checkpoint.kept_files import kept_tokenizer
from megatron_mtp.checkpoint.manifest import read_manifest
from megatron_mtp.checkpoint.preflight import tokenizer_fingerprint
from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.config import ConfigContainer
from megatron_mtp.convert.load import config_of, is_hf_folder, load_weights
from megatron_mtp.data.sources import check_data
from megatron_mtp.device.process_group import env_rank, job_size
from megatron_mtp.errors import ConfigError, Problem
from megatron_mtp.observe.logs import setup_logging
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.storage.place import Place
from megatron_mtp.training.evaluation import BetweenBatches, EvaluationResult, evaluate
from megatron_mtp.training.guards.preemption import SignalWatch
from megatron_mtp.training.pretrain import prepare_config
from megatron_mtp.training.setup import leave_groups, setup
from megatron_mtp.training.start_card import log_repeats

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEvaluation:
    """What was evaluated, with which result.

    Attributes:
        iteration: of the checkpoint; None: a Hugging Face folder.
        layout: parallel sizes by their short names (tp, pp, cp, ep, dp).
        batch_size: samples of a global batch.
        samples: by set, those that were read, over all ranks; one that was read twice counts twice.
        results: by set, the main one first.
    """

    iteration: int | None
    layout: dict[str, int]
    batch_size: int
    samples: dict[str, int]
    results: dict[str, EvaluationResult]


def evaluation_config(
    source: str | Place, sets: Mapping[str, str] | None = None, *, keep_layout: bool = False
) -> ConfigContainer:
    """The config of the model in `source`, made one that evaluates; not finalized. It saves, logs and resumes nothing.

    Args:
        source: a checkpoint as `checkpoint_folder` takes it, or a Hugging Face folder.
        sets: name -> prefix of data sets to evaluate in place of the run's own.
        keep_layout: keep the run's parallel sizes; otherwise each of them is 1, and all ranks are data-parallel.

    Raises:
        CheckpointError, ConversionError, ConfigError: it holds no model, or its config cannot be read.
    """
    if keep_layout and not is_hf_folder(source):
        cfg = StoredWeights(source, verify=False).config()
    else:
        cfg = config_of(source)
    _take_kept_tokenizer(cfg, source)
    for name in ("checkpoint", "logger", "profiling"):
        setattr(cfg, name, type(getattr(cfg, name))())
    cfg.train.update(on_nan="skip", on_spike="report")
    cfg.validation.draft_prompts = 0
    if sets:  # the data of the training may be elsewhere
        cfg.dataset.update(blend=None, blend_per_split=None, mock=True, split="1,0,0")
        cfg.dataset.valid_sets = {name: [prefix] for name, prefix in sets.items()}
    elif is_hf_folder(source):
        raise ConfigError("--set: a Hugging Face folder names no data. Give --set name=prefix.")
    return cfg


def evaluate_checkpoint(
    cfg: ConfigContainer,
    source: str | Place,
    names: Sequence[str] | None = None,
    *,
    show: Callable[[str], None] | None = None,
) -> CheckpointEvaluation:
    """Losses and acceptance of every depth on each validation set. Joins the job that torchrun describes.

    While it evaluates in the main thread, it catches SIGTERM, and SIGUSR1, for which there is nothing to save. No
    callback is called.

    Args:
        cfg: from `evaluation_config`, with changes.
        source: as there.
        names: sets to evaluate; None: all, the main one first.
        show: takes a line about the progress twice a second; None: one is logged every minute.

    Raises:
        ConfigError, DataError, CheckpointError: on every rank, before the first batch.
        StoppedEvaluationError: on every rank: some rank has received SIGTERM.
    """
    iteration = None
    if not is_hf_folder(source):  # once: RUN@best may move while this reads
        source = checkpoint_folder(source)
        iteration = read_manifest(source).iteration
    resolved = resolve(prepare_config(cfg, job_size()), job_size())
    setup_logging(env_rank())
    _check_tokenizer(resolved.cfg, source)
    check_data(resolved.cfg)
    try:
        run = setup(resolved)
        try:
            log_repeats(run.data)
            load_weights(run.engine.chunks, source, resolved.cfg, run.groups)
            with SignalWatch() as signals:
                between = BetweenBatches(signals, _nothing_to_save, logger.info)
                if show is not None:
                    between = BetweenBatches(signals, _nothing_to_save, show, first_s=0.0, every_s=0.5)
                results = evaluate(run.engine, run.data, loss_factor=0.0, names=names, between=between)
            grid, batch_size = resolved.grid, resolved.cfg.validation.eval_global_batch_size
            assert batch_size is not None, "finalize fills it"
            return CheckpointEvaluation(
                iteration=iteration,
                layout={"tp": grid.tp, "pp": grid.pp, "cp": grid.cp, "ep": grid.ep, "dp": grid.dp_size},
                batch_size=batch_size,
                samples={name: run.data.num_valid_samples(name) for name in results},
                results=results,
            )
        finally:
            run.data.close()
    finally:
        leave_groups()


def _nothing_to_save() -> None:
    logger.info("SIGUSR1: an evaluation has nothing to save.")


def _take_kept_tokenizer(cfg: ConfigContainer, source: str | Place) -> None:
    """Names the tokenizer that the run keeps where that of its config cannot be read: the run may have been moved."""
    named = cfg.tokenizer.tokenizer_model
    if named is None or is_hf_folder(source) or os.access(named, os.R_OK):
        return
    if kept := kept_tokenizer(cfg, checkpoint_folder(source)):
        cfg.tokenizer.tokenizer_model = str(kept)


def _check_tokenizer(cfg: ConfigContainer, source: str | Place) -> None:
    if is_hf_folder(source):
        return
    folder = checkpoint_folder(source)
    kept = kept_tokenizer(cfg, folder)
    if kept is not None and cfg.tokenizer.tokenizer_model == str(kept):
        logger.info("tokenizer: %s, which the run keeps, is used", kept)
    known, present = read_manifest(folder).tokenizer, tokenizer_fingerprint(cfg)
    if known is not None and present is not None and known != present:
        rule = "is another tokenizer than that of the checkpoint"
        fields = ("tokenizer.tokenizer_model",)
        raise ConfigError(Problem(fields=fields, value=cfg.tokenizer.tokenizer_model, rule=rule))
