"""Proposed and accepted drafts equal those of transformers' MTP candidate generator on the same weights and prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tests.convert.hf_models import COMMON, make
from tests.convert.mtp_forms import add_depths
from tests.decode.test_greedy import prompts

pytestmark = pytest.mark.dist

NEW_TOKENS = 40


@dataclass
class Seen:
    """Counts taken by wrapping the generator."""

    proposed: int = 0
    accepted: int = 0
    rounds: int = 0
    lengths: list[int] = field(default_factory=list)


def decode(source: str, rows: list[list[int]], num_draft: int) -> list[tuple[list[int], list[int], list[int], int]]:
    """On a rank: tokens, proposed and accepted of each prompt by itself."""
    from megatron_mtp.decode.model import Decoder
    from megatron_mtp.decode.speculate import Options, generate
    from tests.convert.ours import built

    with built(source, {}) as (cfg, chunks, _):
        decoder = Decoder.build(cfg.model, chunks[0].state_dict())
        options = Options(max_new_tokens=NEW_TOKENS, num_draft=num_draft, context=64)
        results = [generate(decoder, [row], options) for row in rows]
    return [(r.tokens[0], r.counts.proposed, r.counts.accepted, r.counts.rounds) for r in results]


@pytest.mark.parametrize("num_depths", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["deepseek_v3", pytest.param("glm4_moe", marks=pytest.mark.slow)])
def test_counts(name, num_depths, ranks, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.candidate_generator import MTPCandidateGenerator

    model = make(name, tmp_path, vocab_size=4, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    add_depths(model, tmp_path, "deepseek", num_depths, "num_nextn_predict_layers")
    first = COMMON["num_hidden_layers"]
    patterns = [rf"model\.layers\.{first + k}.*" for k in range(num_depths)]
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", patterns)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    loaded.generation_config.eos_token_id = None

    seen = Seen()

    class Counting(MTPCandidateGenerator):
        def get_candidates(self, input_ids, *args, **kwargs):
            ids, logits = super().get_candidates(input_ids, *args, **kwargs)
            seen.lengths.append(ids.shape[1] - input_ids.shape[1])
            return ids, logits

        def update_candidate_strategy(self, input_ids, scores, num_matches):
            if seen.lengths[-1]:
                seen.rounds += 1
                seen.proposed += seen.lengths[-1]
                seen.accepted += int(num_matches)

    monkeypatch.setattr("transformers.generation.utils.MTPCandidateGenerator", Counting)
    # With D = 3 transformers 5.23 needs prompts of four tokens.
    rows = [[*row, 1, 3, 2] for row in prompts(6, seed=1)]
    [ours] = ranks(1).run(decode, str(tmp_path), rows, num_depths)
    total = 0
    for row, (tokens, proposed, accepted, rounds) in zip(rows, ours, strict=True):
        seen.proposed = seen.accepted = seen.rounds = 0
        ids = torch.tensor([row])
        out = loaded.generate(ids, use_mtp=True, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert out[0, ids.shape[1] :].tolist() == tokens
        assert (seen.proposed, seen.accepted, seen.rounds) == (sum(proposed), sum(accepted), rounds)
        total += sum(accepted)
    assert total > 0
