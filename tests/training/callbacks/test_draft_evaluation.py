"""Drafting beside training: the watch inside evaluation, and acceptance on a text as training counts it."""

from __future__ import annotations

import pytest

from megatron_mtp.errors import UnsupportedError
from megatron_mtp.recipes import get_recipe
from tests.harness.runs import opened

pytestmark = pytest.mark.dist


def config():
    cfg = get_recipe("tiny_dense")
    cfg.model.num_layers, cfg.model.hidden_size, cfg.model.ffn_hidden_size = 2, 32, 64
    cfg.model.vocab_size, cfg.model.seq_length, cfg.model.init_method_std = 32, 32, 0.15
    cfg.train.train_iters, cfg.validation.eval_iters = 2, 2
    cfg.validation.draft_prompts = 3
    cfg.dist.device, cfg.dist.num_threads = "cpu", 1
    return cfg


def evaluate_both_ways(cfg):
    """(training's chain counts, the decoder's on the same samples, the callback's metrics)."""
    from megatron_mtp.decode.measure import TextCounts, acceptance_on_text
    from megatron_mtp.decode.model import Decoder
    from megatron_mtp.model.sharded import unwrap
    from megatron_mtp.training.callbacks.draft_evaluation import DraftEvaluation
    from megatron_mtp.training.evaluation import evaluate
    from megatron_mtp.training.state import TrainState

    with opened(cfg.finalize(world_size=1)) as run:
        results = evaluate(run.engine, run.data, 0.1)
        decoder = Decoder.build(cfg.model, unwrap(run.engine.chunks[0]).state_dict())
        counts = TextCounts()
        for batch in run.data.valid():
            for micro in batch.micro_batches:
                for tokens, last in zip(micro.tokens.tolist(), micro.labels[0, :, -1].tolist(), strict=True):
                    counts.add(acceptance_on_text(decoder, [*tokens, last], 2))
        watch = DraftEvaluation.from_config(cfg)
        return results["valid"].acceptance, counts, watch.on_evaluation(run, TrainState(), results)


def test_acceptance_is_that_of_training_evaluation(ranks):
    [(trained, decoded, figures)] = ranks(1).run(evaluate_both_ways, config())
    assert decoded.reached == trained[3, 1:].tolist()
    assert decoded.agreed == trained[4, 1:].tolist()
    assert 0 < decoded.agreed[0] < decoded.reached[0]
    assert figures["drafting/tokens_per_pass"] >= 1.0
    assert 0.0 <= figures["drafting/accepted_1"] <= 1.0


def test_layouts_that_cannot_decode_are_refused():
    from megatron_mtp.training.callbacks.draft_evaluation import DraftEvaluation

    cfg = config()
    cfg.model.pipeline_model_parallel_size = 2
    cfg.model.mtp_num_layers = 0
    with pytest.raises(UnsupportedError) as error:
        DraftEvaluation.from_config(cfg)
    assert len(error.value.problems) == 2
    cfg.validation.draft_prompts = 0
    assert DraftEvaluation.from_config(cfg) is None


def test_it_decodes_wherever_the_model_is_built_of_torch_modules(monkeypatch):
    """With Transformer Engine at hand: on the CPU, and where attention stops at documents."""
    import torch

    from megatron_mtp.device.select import Device
    from megatron_mtp.model import build
    from megatron_mtp.training.callbacks import draft_evaluation

    monkeypatch.setattr(build, "te_is_available", lambda: True)
    cfg = config()
    assert draft_evaluation.DraftEvaluation.from_config(cfg) is not None
    gpu = Device(torch.device("cuda", 0), "a GPU", "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(draft_evaluation, "pick_device", lambda wanted: gpu)
    with pytest.raises(UnsupportedError, match="torch backend"):
        draft_evaluation.DraftEvaluation.from_config(cfg)
    cfg.dataset.reset_attention_mask = True
    assert draft_evaluation.DraftEvaluation.from_config(cfg) is not None
