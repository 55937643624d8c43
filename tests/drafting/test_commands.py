"""generate, spec-eval and continuations on a briefly trained run."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A run of a byte model, trained for three steps. The file of its tokenizer, in the folder of the training, is gone
    after that, so that every test here depends on the copy that the run keeps."""
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("run")
    ranks = (f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256))
    (folder / "bytes.tiktoken").write_text("\n".join(ranks))
    fields = "model.num_layers=2 model.hidden_size=32 model.ffn_hidden_size=64 model.vocab_size=257 model.seq_length=64"
    fields += " train.train_iters=3 validation.eval_iters=1 validation.draft_prompts=2 dist.device=cpu"
    fields += " tokenizer.tokenizer_type=tiktoken tokenizer.tokenizer_model=bytes.tiktoken"
    fields += f" checkpoint.save={folder / 'checkpoints'} logger.log_dir={folder}"
    command = [sys.executable, "-m", "megatron_mtp", "pretrain", "tiny_dense", *fields.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder / "bytes.tiktoken").unlink()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluation = [record for record in records if record["kind"] == "evaluation"][-1]
    assert evaluation["drafting/tokens_per_pass"] >= 1.0
    return folder / "checkpoints"


def call(*arguments):
    """(exit code, standard output, standard error) of the command line."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "megatron_mtp", *map(str, arguments)], capture_output=True, text=True, timeout=200
    )
    return done.returncode, done.stdout, done.stderr


def test_evaluate_takes_the_kept_tokenizer(run_directory, tmp_path, monkeypatch, capsys):
    from megatron_mtp.cli.main import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(run_directory), "dist.device=cpu", "--json"])
    shown = capsys.readouterr()
    assert not end.value.code, shown.err
    assert json.loads(shown.out)["iteration"] == 3
    assert f"{run_directory / 'hf' / 'bytes.tiktoken'}, which the run keeps" in shown.err


def test_spec_eval_names_the_options_that_the_context_does_not_hold(run_directory, tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 20)
    code, _, error = call("spec-eval", run_directory, "--data", tmp_path / "text.txt", "--device", "cpu")
    assert code == 2
    assert "--prompt-tokens 64 and --new-tokens 64: together more than the model's context of 64" in error


def test_generate(run_directory):
    arguments = ["generate", run_directory, "--prompt", "import os"]
    arguments += ["--max-new-tokens", "12", "--ignore-end", "--device", "cpu"]
    code, out, _ = call(*arguments, "--num-draft", "3", "--json")
    assert code == 0
    drafted = json.loads(out)
    assert len(drafted["rows"][0]["tokens"]) == 12
    assert (drafted["new_tokens"], drafted["tokens_after_prefill"]) == (12, 11)
    assert drafted["tokens_per_pass"] == 11 / drafted["rounds"]
    code, out, _ = call(*arguments, "--num-draft", "3", "--json", "--nproc", "2")
    assert code == 0
    assert json.loads(out)["rows"] == drafted["rows"]
    code, out, error = call(*arguments, "--num-draft", "0", "--stream")
    assert code == 0
    assert "12 tokens" in error
    assert len(out.strip()) > 0


def test_a_file_of_requests(run_directory, tmp_path, capsys):
    """In batches, each answer beside its request; the default number of tokens is what the context of 64 holds."""
    requests = [{"prompt": "import os", "id": "a"}, {"ids": [100, 101]}, {"prompt": "x" * 60}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    files = ["--prompt-file", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"]
    options = ["--batch", "2", "--num-draft", "2", "--ignore-end", "--device", "cpu"]
    assert in_process("generate", run_directory, *files, *options) == 0
    assert capsys.readouterr().out == ""
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{key: answer[key] for key in given} for given, answer in zip(requests, answers, strict=True)] == requests
    assert [len(answer["tokens"]) for answer in answers] == [55, 62, 4]
    assert {answer["finish_reason"] for answer in answers} == {"length"}
    text = answers[0]["text"]
    stop = text[10]
    options = ["--stop", stop, "--num-draft", "2", "--ignore-end", "--device", "cpu", "--json"]
    assert in_process("generate", run_directory, "--prompt", "import os", *options) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["finish_reason"], row["text"]) == ("stop", text[: text.index(stop)])


def in_process(*arguments) -> int:
    """Exit code of the command line, without a new interpreter."""
    from megatron_mtp.cli.main import main

    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    return int(end.value.code or 0)


def test_mistakes(run_directory):
    arguments = ["--prompt", "x" * 80, "--max-new-tokens", "12", "--device", "cpu"]
    code, _, error = call("generate", run_directory, *arguments)
    assert code == 2
    assert "context of 64" in error
    assert "Traceback" not in error
    code, _, error = call("generate", run_directory, "--prompt", "x", "--num-draft", "many")
    assert (code, "--num-draft many" in error) == (2, True)
    code, _, error = call("generate", run_directory.parent / "nothing", "--prompt", "x", "--device", "cpu")
    assert (code, "Traceback" in error) == (2, False)


@pytest.mark.slow
def test_spec_eval(run_directory, tmp_path):
    from megatron_mtp.data.indexed import IndexedReader
    from megatron_mtp.drafting.continuations import main

    for name in ("code", "prose"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} {i} " * 9}) + "\n" for i in range(3))
        )
    files = [option for name in ("code", "prose") for option in ("--data", tmp_path / f"{name}.jsonl")]
    sizes = ["--num-draft", "2", "--prompts", "2", "--prompt-tokens", "12", "--new-tokens", "16"]
    outputs = ["--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"]
    code, out, _ = call("spec-eval", run_directory, *files, *sizes, *outputs, "--device", "cpu")
    assert code == 0
    assert "prose" in out
    domains = {d["name"]: d for d in json.loads((tmp_path / "out.json").read_text())["domains"]}
    assert list(domains) == ["code", "prose", "all"]
    assert all(d["num_equal"] == d["num_prompts"] for d in domains.values())
    assert domains["all"]["proposed"][0] == sum(domains[n]["proposed"][0] for n in ("code", "prose"))
    assert (tmp_path / "out.png").stat().st_size > 1000

    arguments = [run_directory, "--data", tmp_path / "code.jsonl", "--out", tmp_path / "self/train", "--prompts", "3"]
    assert main([*map(str, arguments), "--prompt-tokens", "6", "--new-tokens", "10", "--threads", "1"]) == 0
    text, mask = IndexedReader(str(tmp_path / "self/train")), IndexedReader(str(tmp_path / "self/train_loss_mask"))
    assert len(text) == len(mask) == 3
    assert np.array_equal(mask.read(0)[:6], np.zeros(6))
    assert mask.read(0)[6:16].all()
    assert not mask.read(0)[16:].any()  # the document's end, which the model did not write
    assert bytes(text.read(0)[:6].tolist()) == b"code 0"
