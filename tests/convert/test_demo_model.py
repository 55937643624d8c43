"""A short demo run on two stages, exported: transformers loads it with its tokenizer and writes the same text."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_mtp.convert.checking import check_hf
from megatron_mtp.convert.exporting import export_hf
from megatron_mtp.convert.importing import import_hf
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.examples.demo import DemoData, train_command
from megatron_mtp.examples.stdlib_corpus import stdlib_jsonl
from tests.convert.ours import built, forward

pytestmark = [pytest.mark.slow, pytest.mark.dist]

LENGTH = 24
PROMPTS = ("import ", "def __init__(self", "class ", "    return ", "for i in")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run directory of 40 steps, data): what `make demo` does, on a part of its text."""
    folder = tmp_path_factory.mktemp("demo")
    parts = []
    for text, options in zip(stdlib_jsonl(folder / "text"), (PrepareOptions(train_vocab_size=1024), None), strict=True):
        few = text.with_name(f"few_{text.name}")
        few.write_text("".join(text.read_text(encoding="utf-8").splitlines(keepends=True)[:30]), encoding="utf-8")
        parts.append(prepare([few], folder / few.stem, options or PrepareOptions(tokenizer=parts[0].tokenizer)))
    data = DemoData(parts[0].prefixes[0], parts[1].prefixes[0], parts[0].tokenizer)
    command = train_command(data, folder, ["train.train_iters=40", "validation.eval_iters=2"])
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "checkpoints", data


def greedy(source: str, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """On one rank: continuations without a cache."""
    with built(source, {}) as (cfg, chunks, groups):
        found = []
        for ids in prompts:
            for _ in range(LENGTH):
                ids = torch.cat([ids, forward(cfg, chunks[0], groups, ids)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
            found.append(ids)
        return found


def test_transformers_continues_the_same_way(trained, ranks, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint, _ = trained
    report = export_hf(checkpoint, tmp_path / "hf")
    assert {"mtp.layers.0.eh_proj.weight", "mtp.layers.1.eh_proj.weight"} <= set(report.written)
    assert check_hf(checkpoint, tmp_path / "hf").is_equal
    import_hf(tmp_path / "hf", tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token_id == model.config.eos_token_id
    prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    (ours,) = ranks(1).run(greedy, str(checkpoint), prompts)
    for prompt, ids in zip(prompts, ours, strict=True):
        theirs = model.generate(prompt, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False)
        # transformers never ends before min_new_tokens: where ours would, the two differ by that rule.
        if model.config.eos_token_id not in ids[0].tolist():
            assert tokenizer.decode(ids[0]) == tokenizer.decode(theirs[0])
    assert any(model.config.eos_token_id not in ids[0].tolist() for ids in ours)
