import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import zstandard
from typer.testing import CliRunner

from megatron_mtp.cli.prepare import prepare as prepare_command
from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.data.prepare import run as prepare_run
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.data.sidecar import Sidecar
from megatron_mtp.data.sources import check_data
from megatron_mtp.data.tokenizer import tokenizer_from_spec
from megatron_mtp.errors import ConfigError, DataError, InUseError

pytestmark = pytest.mark.unit


@pytest.fixture
def inputs(tmp_path):
    """Four files of 50 documents whose texts are all different."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        texts = [f"file {number} line {line} " + "word " * (line % 7) for line in range(50)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def documents(prefix, spec="bytes"):
    tokenizer, reader = tokenizer_from_spec(spec), IndexedReader(prefix)
    out = []
    for place in range(len(reader)):
        ids = reader.read(place).tolist()
        assert ids[-1] == tokenizer.eod
        out.append(tokenizer.decode(ids[:-1]))
    return out


def all_texts(folder):
    return [json.loads(line)["text"] for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


def files_of(prefixes):
    return {Path(p).name + e: Path(p + e).read_bytes() for p in prefixes for e in (".bin", ".idx", ".json")}


def test_in_order_without_a_shuffle(inputs, tmp_path):
    made = prepare([inputs], tmp_path / "out", PrepareOptions(tokenizer="bytes"), workers=1)
    assert made.prefixes == [f"{tmp_path}/out_text_document"]
    assert documents(made.prefixes[0]) == all_texts(inputs)
    sidecar = Sidecar.load(made.prefixes[0])
    reader = IndexedReader(made.prefixes[0])
    assert (sidecar.num_documents, sidecar.num_tokens) == (200, int(reader.lengths().sum()))
    assert (sidecar.largest_id, sidecar.vocab_size, sidecar.eod, sidecar.append_eod) == (256, 257, 256, True)
    assert sidecar.bin_bytes == reader.bin_size == made.counts.tokens * 2
    assert sidecar.idx_bytes == Path(f"{made.prefixes[0]}.idx").stat().st_size
    assert sidecar.sources == [str(inputs / f"{n}.jsonl") for n in range(4)]
    assert not (tmp_path / "out.prepare").exists()


def test_shuffle_spreads_every_document_once_and_follows_from_the_seed(inputs, tmp_path):
    def run(name, seed, workers=1):
        options = PrepareOptions(tokenizer="bytes", shards=3, shuffle=seed)
        return prepare([inputs], tmp_path / name / "out", options, workers=workers).prefixes

    first = run("a", 1)
    assert [Path(prefix).name for prefix in first] == [f"out_0{n}_text_document" for n in (1, 2, 3)]
    shards = [documents(prefix) for prefix in first]
    texts = all_texts(inputs)
    assert sorted(text for shard in shards for text in shard) == sorted(texts)
    assert all(40 < len(shard) < 95 for shard in shards)
    for shard in shards:
        places = [texts.index(text) for text in shard]
        assert places != sorted(places)
        assert {place // 50 for place in places} == {0, 1, 2, 3}
    assert files_of(run("b", 1)) == files_of(first)
    assert files_of(run("c", 1, workers=2)) == files_of(first)
    assert files_of(run("d", 2)) != files_of(first)


def test_many_buckets_give_a_whole_shuffle_too(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_run, "_SHUFFLE_BYTES_PER_TOKEN", 64 * 2**20 / 300)  # 300 tokens fit in memory
    options = PrepareOptions(tokenizer="bytes", shuffle=1, memory_mib=64)
    (prefix,) = prepare([inputs], tmp_path / "out", options, workers=1).prefixes
    shuffled = documents(prefix)
    assert sorted(shuffled) == sorted(all_texts(inputs))
    halves = collections.Counter(int(text.split()[1]) for text in shuffled[:100])
    assert all(10 < halves[number] < 40 for number in range(4))


def test_trained_tokenizer_lies_beside_the_output_and_fits_the_data(inputs, tmp_path):
    made = prepare([inputs], tmp_path / "d" / "out", PrepareOptions(train_vocab_size=270), workers=1)
    assert made.tokenizer == f"{tmp_path}/d/tokenizer.json"
    assert made.vocab_size == 270
    assert documents(made.prefixes[0], made.tokenizer) == all_texts(inputs)
    cfg = ConfigContainer()
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model = "huggingface", made.tokenizer
    cfg.dataset.blend, cfg.dataset.split, cfg.model.seq_length = [made.prefixes, None], "9,1,0", 16
    check_data(cfg)
    cfg.tokenizer.tokenizer_type = "bytes"
    with pytest.raises(DataError, match="was made by the tokenizer huggingface-"):
        check_data(cfg)
    cfg.tokenizer.tokenizer_type, cfg.model.vocab_size = "null", 270  # has ids alone
    check_data(cfg)
    cfg.dataset.reset_attention_mask = True  # needs the end of a document, which gives it away
    with pytest.raises(DataError, match=r"end with id \d+, but the run's end-of-document id is 269"):
        check_data(cfg)
    with pytest.raises(DataError, match=r"tokenizer\.json: exists"):
        prepare([inputs], tmp_path / "d" / "other", PrepareOptions(train_vocab_size=280), workers=1)
    again = prepare([inputs], tmp_path / "d" / "out", PrepareOptions(train_vocab_size=270), workers=1)
    assert again.was_done


def test_running_again_does_nothing_and_other_contents_are_not_replaced_by_accident(inputs, tmp_path):
    options = PrepareOptions(tokenizer="bytes", shards=2)
    made = prepare([inputs], tmp_path / "out", options, workers=1)
    times = [os.stat(f"{prefix}.bin").st_mtime_ns for prefix in made.prefixes]
    again = prepare([inputs], tmp_path / "out", options, workers=1)
    assert again.was_done
    assert (again.prefixes, again.counts.tokens) == (made.prefixes, made.counts.tokens)
    assert [os.stat(f"{prefix}.bin").st_mtime_ns for prefix in made.prefixes] == times
    other = PrepareOptions(tokenizer="bytes", shards=2, shuffle=1)
    with pytest.raises(DataError, match=r"out_01_text_document\.idx: exists.*--overwrite"):
        prepare([inputs], tmp_path / "out", other, workers=1)
    before = files_of(made.prefixes)
    prepare([inputs], tmp_path / "out", other, workers=1, overwrite=True)
    assert files_of(made.prefixes) != before


@pytest.mark.parametrize("place", ["tokenize", "assemble", "publish"])
def test_stopped_anywhere_it_leaves_no_data_set_and_goes_on(inputs, tmp_path, monkeypatch, place):
    options = PrepareOptions(tokenizer="bytes", shards=2, shuffle=4)
    complete = files_of(prepare([inputs], tmp_path / "complete" / "out", options, workers=1).prefixes)
    names = {
        "tokenize": "megatron_mtp.data.prepare.tokenize_files._tokenize",
        "assemble": "megatron_mtp.data.prepare.run.assemble_shard",
        "publish": "megatron_mtp.data.prepare.run._move",
    }
    module, name = names[place].rsplit(".", 1)
    real, calls = getattr(sys.modules[module], name), []

    def stop_at_the_second_call(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(names[place], stop_at_the_second_call)
        with pytest.raises(KeyboardInterrupt):
            prepare([inputs], tmp_path / "out", options, workers=1)
    assert not list(tmp_path.glob("out_*.idx"))
    calls.clear()
    patched = {"tokenize": 3, "assemble": 1}  # what was done before the stop is not done again
    with monkeypatch.context() as patch:
        patch.setattr(names[place], lambda *args: calls.append(args) or real(*args))
        made = prepare([inputs], tmp_path / "out", options, workers=1)
    assert files_of(made.prefixes) == complete
    assert len(calls) == patched.get(place, len(calls))
    assert not (tmp_path / "out.prepare").exists()


def test_changed_input_starts_afresh(inputs, tmp_path, monkeypatch):
    options = PrepareOptions(tokenizer="bytes")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_run, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare([inputs], tmp_path / "out", options, workers=1)
    (inputs / "0.jsonl").write_text('{"text": "new"}\n')
    (prefix,) = prepare([inputs], tmp_path / "out", options, workers=1).prefixes
    assert documents(prefix) == all_texts(inputs)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert value
    return value


def test_killed_process_leaves_no_data_set_and_a_second_one_is_kept_out(inputs, tmp_path):
    code = f"""
import time
from pathlib import Path
from megatron_mtp.data.prepare import run
run._assemble = lambda *_: (Path({str(tmp_path / "marker")!r}).touch(), time.sleep(600))
run.prepare([{str(inputs)!r}], {str(tmp_path / "out")!r}, run.PrepareOptions(tokenizer="bytes"), workers=1)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_for((tmp_path / "marker").exists)
    with pytest.raises(InUseError, match=rf"is in use by process {process.pid} on "):
        prepare([inputs], tmp_path / "out", PrepareOptions(tokenizer="bytes"), workers=1)
    process.kill()
    process.wait(30)
    assert not list(tmp_path.glob("out_*"))
    (prefix,) = prepare([inputs], tmp_path / "out", PrepareOptions(tokenizer="bytes"), workers=1).prefixes
    assert documents(prefix) == all_texts(inputs)


def test_a_trained_tokenizer_may_lie_in_a_folder_that_is_not_there_yet(inputs, tmp_path):
    target = tmp_path / "tok" / "shared" / "tokenizer.json"
    made = prepare([inputs], tmp_path / "out", PrepareOptions(tokenizer=str(target), train_vocab_size=270), workers=1)
    assert made.tokenizer == str(target)
    assert documents(made.prefixes[0], str(target)) == all_texts(inputs)


def test_workers_end_with_a_killed_parent(tmp_path):
    pipes = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for pipe in pipes:
        os.mkfifo(pipe)  # a worker waits here for ever
    code = f"""
from pathlib import Path
from megatron_mtp.data.prepare import run
run.list_inputs = lambda inputs: list(map(Path, inputs))  # which refuses pipes
run.prepare({list(map(str, pipes))!r}, {str(tmp_path / "out")!r}, run.PrepareOptions(tokenizer="bytes"), workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    ends = [wait_for(lambda pipe=pipe: opened_by_a_reader(pipe)) for pipe in pipes]
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(pids) >= 2
    process.kill()
    process.wait(30)
    wait_for(lambda: not any(is_running(pid) for pid in pids))
    for end in ends:
        os.close(end)


def opened_by_a_reader(pipe):
    """The writing end of a pipe that a worker reads from, None before it does."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_malformed_line_is_named_or_counted(inputs, tmp_path, workers):
    (inputs / "2.jsonl").write_text('{"text": "ok"}\nnot json\n{"text": ""}\n{"text": "end"}\n')
    with pytest.raises(DataError, match=r"2\.jsonl:2: is not JSON"):
        prepare([inputs], tmp_path / "out", PrepareOptions(tokenizer="bytes"), workers=workers)
    assert not list(tmp_path.glob("out_*"))
    options = PrepareOptions(tokenizer="bytes", skip_bad_lines=True)
    made = prepare([inputs], tmp_path / "out", options, workers=workers)
    assert (made.counts.documents, made.counts.skipped, made.counts.empty) == (152, 1, 1)
    assert "2.jsonl:2: is not JSON" in made.counts.first_skipped


def test_ids_outside_a_null_vocabulary_name_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "1 2"}\n{"text": "1 9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: cannot be tokenized"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", PrepareOptions(tokenizer="null:9"))


def test_no_text_at_all_and_bad_options(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no line holds a text"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", PrepareOptions(tokenizer="bytes"))
    with pytest.raises(ConfigError) as info:
        PrepareOptions(shards=0, shuffle=-1, train_vocab_size=256, memory_mib=1)
    assert len(info.value.problems) == 4
    with pytest.raises(ConfigError, match="--tokenizer: is missing"):
        PrepareOptions()


def test_without_eod(inputs, tmp_path):
    options = PrepareOptions(tokenizer="bytes", append_eod=False)
    (prefix,) = prepare([inputs], tmp_path / "out", options, workers=1).prefixes
    reader = IndexedReader(prefix)
    assert bytes(reader.read(0).astype("uint8").tolist()).decode() == all_texts(inputs)[0]
    assert Sidecar.load(prefix).largest_id < 256


def main():
    app = typer.Typer()
    app.command()(prepare_command)
    app()


def test_command_line(inputs, tmp_path):
    app = typer.Typer()
    app.command()(prepare_command)
    run = CliRunner().invoke
    arguments = [
        str(inputs),
        "--output",
        str(tmp_path / "out"),
        "--train-tokenizer",
        "--vocab-size",
        "300",
        "--shards",
        "2",
    ]
    result = run(app, [*arguments, "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert "200 documents" in result.output
    assert f"{tmp_path}/out_02_text_document" in result.output
    assert "Nothing to do" in run(app, [*arguments, "--workers", "1"]).output
    result = run(app, [str(inputs), "--output", str(tmp_path / "x"), "--train-tokenizer"])
    assert isinstance(result.exception, ConfigError)


def test_needs_no_torch():
    code = (
        "import sys, megatron_mtp.data.prepare.run\n"
        "import megatron_mtp.examples.bigram, megatron_mtp.examples.stdlib_corpus\n"
        "assert not {'torch', 'megatron', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_dclm_script_makes_ten_data_sets(tmp_path):
    (tmp_path / "raw" / "deep").mkdir(parents=True)
    lines = "".join(json.dumps({"text": f"page {page}", "url": "u"}) + "\n" for page in range(300)).encode()
    (tmp_path / "raw" / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "raw" / "deep" / "b.jsonl.zst").write_bytes(zstandard.compress(lines))
    script = Path(__file__).parents[3] / "scripts" / "prepare_dclm.sh"
    environment = {**os.environ, "MEGATRON_MTP": f"{sys.executable} -m megatron_mtp", "SEED": "7"}
    arguments = [str(tmp_path / "raw"), str(tmp_path / "out"), "bytes", "--workers", "1"]
    subprocess.run(["bash", script, *arguments], env=environment, check=True, timeout=120, cwd=script.parents[1])
    prefixes = [f"{tmp_path}/out/dclm_{shard:02d}_text_document" for shard in range(1, 11)]
    found = [text for prefix in prefixes for text in documents(prefix)]
    assert sorted(found) == sorted(f"page {page}" for page in range(300) for _ in range(2))
    assert subprocess.run(["bash", script], capture_output=True, timeout=60).returncode == 2
