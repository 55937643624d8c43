"""Opens a decoder and its tokenizer from a folder, for `generate` and `spec-eval`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_mtp.config import ConfigContainer
from megatron_mtp.convert.load import config_of, is_hf_folder, load_weights
from megatron_mtp.data.tokenizer import Tokenizer, configured_tokenizer, open_tokenizer, tokenizer_from_spec
from megatron_mtp.decode.model import Decoder
from megatron_mtp.decode.support import refuse_unsupported
from megatron_mtp.decode.tensor_parallel import TensorParallel
from megatron_mtp.device.process_group import job_size
from megatron_mtp.errors import DataError, MegatronMTPError
from megatron_mtp.model.build import build_model
from megatron_mtp.model.dtypes import DTYPES
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.training.setup import join_groups, leave_groups


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A decoder with its config and tokenizer.

    Args:
        tokenizer: None if the folder names no tokenizer that can be opened.
        why_no_tokenizer: the reason, for the user.
    """

    cfg: ConfigContainer
    decoder: Decoder
    tokenizer: Tokenizer | None
    why_no_tokenizer: str = ""

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            DataError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise DataError(
                f"The model's tokenizer cannot be opened, so only token ids can be given. {self.why_no_tokenizer} "
                "Name a tokenizer with --tokenizer."
            )
        return self.tokenizer.encode_batch([text])[0]

    @property
    def stop_ids(self) -> frozenset[int]:
        """End-of-document, if the tokenizer is known."""
        return frozenset() if self.tokenizer is None else frozenset({self.tokenizer.eod})


@contextmanager
def open_decoder(
    source: str | Path,
    *,
    dtype: str = "fp32",
    device: Literal["cpu", "cuda"] | None = None,
    tokenizer: str | None = None,
    threads: int | None = None,
    draft_vocab: int | None = None,
) -> Iterator[LoadedModel]:
    """Loads a model, tensor-parallel over all processes of this job.

    Args:
        source: run directory, folder of one checkpoint, or Hugging Face folder.
        dtype: dtype of weights and caches: "fp32" or "bf16".
        device: "cpu" or "cuda"; None: cuda if available.
        tokenizer: file or folder to use instead of the model's tokenizer.
        threads: threads of each process on a CPU; None: its share of the cores.
        draft_vocab: draft only this many lowest token ids; None: all.

    Raises:
        ConversionError, CheckpointError, UnsupportedError, ConfigError: the model cannot be decoded.
    """
    cfg = decoding_config(source, int(os.environ.get("WORLD_SIZE", "1")), device, threads)
    refuse_unsupported(cfg.model)
    try:
        resolved = resolve(cfg, job_size())
        chosen, groups = join_groups(resolved)
        chunks = build_model(resolved, groups, torch.device("cpu"))
        load_weights(chunks, source, cfg, groups)
        decoder = Decoder.build(
            cfg.model,
            chunks[0].state_dict(),
            TensorParallel(groups.tp),
            dtype=DTYPES[dtype],
            device=chosen.torch_device,
        )
        decoder.limit_drafts(chunks[0].head_weight(), draft_vocab)
        del chunks
        yield LoadedModel(cfg, decoder, *_open_tokenizer(cfg, Path(source), tokenizer))
    finally:
        leave_groups()


def decoding_config(
    source: str | Path, tp: int, device: Literal["cpu", "cuda"] | None = None, threads: int | None = None
) -> ConfigContainer:
    """The finalized config of a folder's model on `tp` tensor-parallel ranks."""
    cfg = config_of(source)
    model = cfg.model
    model.tensor_model_parallel_size = tp
    model.sequence_parallel = tp > 1 and bool(model.num_moe_experts)
    model.backend = "torch"
    model.mtp_freeze_trunk = False
    cfg.train.micro_batch_size = cfg.train.global_batch_size = 1
    cfg.train.rampup_batch_size = None
    if device is not None:
        cfg.dist.device = device
    if threads is not None:
        cfg.dist.num_threads = threads
    return cfg.finalize(world_size=tp)


def _open_tokenizer(cfg: ConfigContainer, source: Path, chosen: str | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer, or None and the reason. Ids can be decoded without one."""
    if chosen is not None:
        return tokenizer_from_spec(chosen), ""
    try:
        if is_hf_folder(source):
            return open_tokenizer("huggingface", str(source)), ""
        return configured_tokenizer(cfg), "Its config names none (tokenizer.tokenizer_type = null)."
    except MegatronMTPError as error:
        return None, str(error)
