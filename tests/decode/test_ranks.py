"""The decoder of a training model, at one and at two tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_mtp.config import ConfigContainer
from megatron_mtp.decode.model import Decoder
from megatron_mtp.decode.sampling import Sampling
from megatron_mtp.decode.speculate import Options, generate
from megatron_mtp.decode.tensor_parallel import TensorParallel
from tests.decode.models import DENSE, MLA, MOE, random_tokens
from tests.decode.test_greedy import NEW_TOKENS, prompts
from tests.harness.runs import joined
from tests.model.plain_to_config import run_config
from tests.reference.plain_model import PlainConfig

pytestmark = pytest.mark.dist

KINDS = {"dense": DENSE, "moe": MOE, "mla": MLA}


def config(plain: PlainConfig, tp: int, etp: int = 1) -> ConfigContainer:
    cfg = run_config(plain, 1, 1).copy()
    cfg.model.tensor_model_parallel_size = tp
    cfg.model.sequence_parallel = tp > 1 and plain.moe is not None  # Megatron-Core's routers want it
    cfg.model.init_method_std = 0.15
    cfg.model.expert_tensor_parallel_size = etp
    return cfg.finalize(world_size=tp)


def with_model(cfg, work, *arguments):
    """work(cfg, chunk, decoder, ...) on this rank, with initial weights, which are the same at every layout."""
    from megatron_mtp.model.build import build_model

    with joined(cfg) as (resolved, groups):
        [chunk] = build_model(resolved, groups, torch.device("cpu"))
        decoder = Decoder.build(cfg.model, chunk.state_dict(), TensorParallel(groups.tp))
        return work(cfg, chunk, decoder, *arguments)


def training_and_decoding_logits(cfg, chunk, decoder):
    """Logits of depths 0..D of the training model and of the decoder on the same tokens, [1+D, s, v]."""
    from tests.decode.test_forward import run_pieces

    depths, length = cfg.model.mtp_num_layers, 12
    tokens = random_tokens(1, length)
    padded = torch.nn.functional.pad(tokens, (0, depths))
    shifted = torch.stack([padded[:, k : k + length] for k in range(1, depths + 1)])
    with torch.no_grad():
        states, weight = chunk(
            input_ids=tokens,
            position_ids=torch.arange(length)[None],
            attention_mask=None,
            output_processor=lambda states, weight, _: (states, weight),
            output_processor_context=SimpleNamespace(shifted_ids=shifted),
        )
        trained = decoder.tp.gather(states[:, :, 0] @ weight.t(), dim=-1)[..., : cfg.model.vocab_size]
    with torch.inference_mode():
        pieces = run_pieces(decoder, tokens, [5, 1, 6])
    return trained, torch.cat(pieces[: 1 + depths])


def tokens_of_all_cells(cfg, chunk, decoder, rows):
    """Tokens of greedy decoding for each K, and of sampling with and without drafts."""
    options = Options(max_new_tokens=NEW_TOKENS, context=64)
    cells = {k: generate(decoder, rows, replace(options, num_draft=k)).tokens for k in range(7)}
    cells["auto"] = generate(decoder, rows, replace(options, num_draft="auto")).tokens
    cells["sampled"] = generate(decoder, rows, replace(options, num_draft=2, sampling=Sampling(1.0))).tokens
    return cells


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2])
def test_logits_of_the_training_model(ranks, size, kind):
    if size == 2 and kind != "dense":
        pytest.skip("hidden states are sharded along the sequence there; tokens are compared below")
    for trained, decoded in ranks(size).run(with_model, config(KINDS[kind], size), training_and_decoding_logits):
        torch.testing.assert_close(decoded, trained, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks(ranks, kind, depths):
    """Three prompts, K from 1 to 6: with drafts as without, on both ranks, and as on one rank."""
    plain = replace(KINDS[kind], vocab_size=4, num_depths=depths)
    rows = prompts(3, seed=depths)
    # Experts sharded over both ranks, or whole on both.
    etp = 2 if depths == 1 else 1
    first, second = ranks(2).run(with_model, config(plain, 2, etp), tokens_of_all_cells, rows)
    [one] = ranks(1).run(with_model, config(plain, 1), tokens_of_all_cells, rows)
    assert first == second
    for cells in (first, one):
        assert all(cells[k] == cells[0] for k in cells if k != "sampled")
    assert first == one
