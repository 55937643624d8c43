"""Opens a decoder and its tokenizer from a folder, for `generate` and `spec-eval`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_mtp.checkpoint.directory import checkpoint_folder
from megatron_mtp.checkpoint.kept_files import kept_folder, tokenizer_of, why_no_text
from megatron_mtp.checkpoint.manifest import read_manifest
from megatron_mtp.config import ConfigContainer
from megatron_mtp.convert.load import config_of, is_hf_folder, load_weights
from megatron_mtp.convert.side_files import end_ids
from megatron_mtp.data.tokenizer import HuggingFaceTokenizer, Tokenizer, open_tokenizer, tokenizer_from_spec
from megatron_mtp.decode.model import Decoder
from megatron_mtp.decode.support import refuse_unsupported
from megatron_mtp.decode.tensor_parallel import TensorParallel
from megatron_mtp.device.process_group import job_size
from megatron_mtp.drafting.chat import render
from megatron_mtp.drafting.requests import Request
from megatron_mtp.errors import DataError, MegatronMTPError
from megatron_mtp.model.build import build_model
from megatron_mtp.model.dtypes import TORCH_DTYPES
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.training.setup import join_groups, leave_groups


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A decoder with its config and tokenizer.

    Args:
        tokenizer: None if the folder names no tokenizer that can be opened.
        why_no_tokenizer: the reason, for the user.
        stop_ids: the ids that end an answer: the tokenizer's end-of-document, and those of the model's files.
    """

    cfg: ConfigContainer
    decoder: Decoder
    tokenizer: Tokenizer | None
    why_no_tokenizer: str = ""
    stop_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, as in training: nothing is added, and names of special tokens are text.

        Raises:
            DataError: there is no tokenizer, or it has no ids for the text.
        """
        tokenizer = self._tokenizer()
        try:
            return tokenizer.encode_batch([text])[0]
        except ValueError as error:
            hint = " It takes ids separated by spaces; give them, or name another one with --tokenizer."
            raise DataError(
                f"The tokenizer ({tokenizer.kind}) has no ids for the prompt {text[:40]!r} ({error})."
                f"{hint if tokenizer.kind == 'null' else ''}"
            ) from None

    def encode_request(self, request: Request, *, chat: bool = False, plain: bool = False) -> list[int]:
        """The ids of a request, equal to those that transformers makes.

        Args:
            chat: a "prompt" is a user's message, for the tokenizer's chat template; "messages" always are.
            plain: `encode` a "prompt" as in training.

        Raises:
            DataError: the tokenizer is missing, or is none of those with special tokens or chat templates.
        """
        if "ids" in request:
            return request["ids"]
        tokenizer = self._tokenizer()
        if "messages" in request or chat:
            if not isinstance(tokenizer, HuggingFaceTokenizer):
                raise DataError(
                    f"The tokenizer ({tokenizer.kind}) has no chat template: only a Hugging Face tokenizer can have "
                    "one. Give prompts as text, or name another tokenizer with --tokenizer."
                )
            messages = request.get("messages") or [{"role": "user", "content": request["prompt"]}]
            return tokenizer.encode_prompt(render(tokenizer, messages), is_rendered=True)
        if plain or not isinstance(tokenizer, HuggingFaceTokenizer):
            return self.encode(request["prompt"])
        return tokenizer.encode_prompt(request["prompt"])

    def decode(self, ids: list[int]) -> str:
        """The text of ids.

        Raises:
            DataError: there is no tokenizer.
        """
        return self._tokenizer().decode(ids)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise DataError(
                f"The model has no tokenizer that can be opened, so only token ids can be given (--prompt-ids). "
                f"{self.why_no_tokenizer} Or name a tokenizer with --tokenizer."
            )
        return self.tokenizer


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
            dtype=TORCH_DTYPES[dtype],
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


def _open_tokenizer(
    cfg: ConfigContainer, source: Path, chosen: str | None
) -> tuple[Tokenizer | None, str, frozenset[int]]:
    """The tokenizer, or None and the reason; and the ids that end an answer. Ids can be decoded without a tokenizer."""
    checkpoint = None if is_hf_folder(source) else checkpoint_folder(source)
    files = source if checkpoint is None else kept_folder(checkpoint)
    found, reason = None, ""
    try:
        if chosen is not None:
            found = tokenizer_from_spec(chosen)
        elif checkpoint is None:
            found, reason = _of_files(source)
        elif cfg.tokenizer.tokenizer_type == "null" and files is not None:
            found, reason = _of_files(files)  # an imported model
        else:
            found = tokenizer_of(cfg, checkpoint, read_manifest(checkpoint).tokenizer)
            reason = "Its config names none (tokenizer.tokenizer_type = null)."
    except MegatronMTPError as error:
        if chosen is not None:
            raise
        reason = str(error)
    ends = (set() if files is None else end_ids(files)) | (set() if found is None else {found.eod})
    return found, reason, frozenset(ends)


def _of_files(folder: Path) -> tuple[Tokenizer | None, str]:
    reason = why_no_text(folder)
    return (open_tokenizer("huggingface", str(folder)), "") if reason is None else (None, reason)
