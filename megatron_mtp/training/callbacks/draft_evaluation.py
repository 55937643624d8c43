"""Decodes a few held-out prompts at each evaluation, with the weights as they are and the MTP layers as the drafter.

The evaluation counts acceptance on the text; this counts it on what the model itself writes, where it can be higher or
lower. It decodes on the ranks that train, so it needs the complete model on each tensor-parallel group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.batch import NO_SAMPLE
from megatron_mtp.decode.model import Decoder
from megatron_mtp.decode.speculate import Counts, Options, generate
from megatron_mtp.decode.support import refuse_unsupported
from megatron_mtp.decode.tensor_parallel import TensorParallel
from megatron_mtp.device.select import pick_device
from megatron_mtp.errors import UnsupportedError
from megatron_mtp.model.build import wants_te
from megatron_mtp.model.dtypes import TORCH_DTYPES
from megatron_mtp.model.sharded import unwrap
from megatron_mtp.training.callbacks.base import ConfiguredCallback, Metrics
from megatron_mtp.training.evaluation import EvaluationResult
from megatron_mtp.training.setup import Run
from megatron_mtp.training.state import TrainState

PREFIX = "drafting"


class DraftEvaluation(ConfiguredCallback):
    """Decodes the beginnings of held-out samples greedily, with one draft for each depth.

    Args:
        num_prompts: prompts of each data-parallel rank.
        prompt_tokens, new_tokens: None: a quarter of a sample each, and at most 32.
    """

    def __init__(self, num_prompts: int, prompt_tokens: int | None = None, new_tokens: int | None = None):
        self.num_prompts, self.prompt_tokens, self.new_tokens = num_prompts, prompt_tokens, new_tokens

    @classmethod
    def from_config(cls, cfg: ConfigContainer) -> DraftEvaluation | None:
        """Asked for by validation.draft_prompts.

        Raises:
            UnsupportedError: the layout or the model cannot decode while it trains.
        """
        if not cfg.validation.draft_prompts:
            return None
        model, named = cfg.model, f"validation.draft_prompts = {cfg.validation.draft_prompts}"
        problems = [
            f"{named}: needs the complete model on each tensor-parallel group, and model.{field} = {size}. "
            "Set it to 0, and run megatron-mtp spec-eval on the checkpoints."
            for field in ("pipeline_model_parallel_size", "expert_model_parallel_size")
            if (size := getattr(model, field)) > 1
        ]
        if not model.mtp_num_layers:
            problems.append(f"{named}: drafts are made by MTP layers, and model.mtp_num_layers = 0.")
        if wants_te(cfg, pick_device(cfg.dist.device).torch_device.type):
            problems.append(
                f"{named}: needs the modules of the torch backend, and model.backend = {model.backend}. "
                "Set model.backend=torch, or run megatron-mtp spec-eval on the checkpoints."
            )
        if problems:
            raise UnsupportedError(problems)
        refuse_unsupported(model)
        return cls(cfg.validation.draft_prompts)

    def on_evaluation(self, run: Run, state: TrainState, results: dict[str, EvaluationResult]) -> Metrics:
        """Metrics over all data-parallel ranks: `drafting/accepted_k` and `drafting/tokens_per_pass`."""
        model = run.cfg.model
        quarter = max(1, min(32, model.seq_length // 4))
        prompts = self._prompts(run, self.prompt_tokens or quarter)
        chunk = unwrap(run.engine.chunks[0])
        decoder = Decoder.build(
            model,
            chunk.state_dict(),
            TensorParallel(run.groups.tp),
            dtype=TORCH_DTYPES[run.cfg.precision.dtype],
            device=run.engine.device,
        )
        options = Options(max_new_tokens=self.new_tokens or quarter, num_draft=model.mtp_num_layers)
        depths = model.mtp_num_layers
        counts = Counts(reached=[0] * depths, agreed=[0] * depths)  # of a rank whose part of the set is empty
        if prompts:
            counts = generate(decoder, prompts, options).counts
        sums = torch.tensor(
            [counts.rounds, counts.new_tokens, *counts.reached, *counts.agreed], device=run.engine.device
        )
        dist.all_reduce(sums, group=run.groups.dp)
        rounds, new_tokens, *columns = sums.tolist()
        depths = len(columns) // 2
        metrics = {f"{PREFIX}/accepted_{k + 1}": columns[depths + k] / columns[k] for k in range(depths) if columns[k]}
        return metrics | {f"{PREFIX}/tokens_per_pass": new_tokens / max(rounds, 1)}

    def _prompts(self, run: Run, length: int) -> list[list[int]]:
        """The beginnings of the first samples of the validation set, the same at each evaluation."""
        stream = run.data.valid(run.data.valid_names[0])
        prompts: list[list[int]] = []
        try:
            for batch in stream:
                for places, micro in zip(batch.places, batch.micro_batches, strict=True):
                    is_sample = batch.sample_ids[places] != NO_SAMPLE
                    prompts += [row[:length].tolist() for row in micro.tokens[torch.from_numpy(is_sample)]]
                if len(prompts) >= self.num_prompts:
                    break
        finally:
            stream.close()
        return prompts[: self.num_prompts]
