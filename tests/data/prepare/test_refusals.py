"""What `prepare` refuses, and what it leaves when it cannot write or is killed."""

import ctypes
import errno
import json
import multiprocessing
import os
import resource
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_mtp.cli.main import main
from megatron_mtp.data.prepare import run as prepare_run
from megatron_mtp.data.prepare.jsonl import list_inputs, read_documents
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.data.tokenizer import tokenizer_from_spec
from megatron_mtp.errors import ConfigError, DataError

pytestmark = pytest.mark.unit
BYTES = PrepareOptions(tokenizer="bytes")


@pytest.fixture
def inputs(tmp_path):
    """Four files of 60 documents, about 4 kB each."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        lines = [json.dumps({"text": f"file {number} line {line} " * 3, "a/b": "x"}) for line in range(60)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def command(capsys):
    """Runs `megatron-mtp prepare`: (exit code, what it said)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["prepare", *map(str, arguments)])
        return ended.value.code or 0, capsys.readouterr().err

    return run


def contents(folder):
    """Files of a folder and what they hold; a sidecar names its inputs, so these must be the same."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def file_sizes_up_to(num_bytes):
    """A disk on which no file can grow further."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def without_the_rights_of_root():
    """Takes the capabilities to ignore permissions from this thread, which root has."""
    libc, header, data = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    before = data[0]
    data[0] = before & ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = before
        assert libc.capset(header, data) == 0


BAD_OUTPUTS = ["", ".", "..", "x/..", "file/out", "file/deep/out", "n" * 300, "n" * 235, "/proc/x/y"]


@pytest.mark.parametrize("output", BAD_OUTPUTS)
def test_an_output_that_no_file_can_have_is_refused_before_any_work(inputs, tmp_path, monkeypatch, command, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, said = command(inputs, "--output", output, "--tokenizer", "bytes", "--workers", 1)
    assert code == 2
    assert "--output" in said
    assert len(said.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "in"]


def test_a_folder_without_permission_to_write(inputs, tmp_path, command):
    (tmp_path / "ro").mkdir(mode=0o555)
    for output in ("ro/out", "ro/new/out"):
        with without_the_rights_of_root():
            code, said = command(inputs, "--output", tmp_path / output, "--tokenizer", "bytes", "--workers", 1)
        assert (code, "cannot be written: Permission denied" in said) == (2, True), said
        assert "Choose another place" in said
    assert not list((tmp_path / "ro").iterdir())


def test_a_tokenizer_that_cannot_be_written_is_refused_before_the_work(inputs, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr(prepare_run, "train_on", lambda *_: pytest.fail("it began to train"))
    for target in ("file/tokenizer.json", "folder.json"):
        options = PrepareOptions(tokenizer=str(tmp_path / target), train_vocab_size=300)
        with pytest.raises(DataError, match=rf"--tokenizer .*{target}: cannot be written"):
            prepare([inputs], tmp_path / "out", options, workers=1, overwrite=True)


def test_a_trained_tokenizer_may_lie_in_a_new_folder(inputs, tmp_path):
    options = PrepareOptions(tokenizer=str(tmp_path / "new" / "deep" / "t.json"), train_vocab_size=300)
    made = prepare([inputs], tmp_path / "out", options, workers=1)
    assert tokenizer_from_spec(made.tokenizer).vocab_size == 300
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["t.json"]


@pytest.mark.parametrize("limit", [10, 100, 4000, 12000, 16000])
def test_a_full_disk_is_one_message_and_the_same_command_goes_on(inputs, tmp_path, limit):
    options = PrepareOptions(train_vocab_size=260, shards=1)
    complete = tmp_path / "complete"
    prepare([inputs], complete / "out", options, workers=1)
    with file_sizes_up_to(limit), pytest.raises(DataError) as info:
        prepare([inputs], tmp_path / "full" / "out", options, workers=1)
    assert f"--output {tmp_path / 'full' / 'out'}: cannot be written: " in str(info.value)
    assert "Make room and run the same command again" in str(info.value)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["out.prepare"]
    prepare([inputs], tmp_path / "full" / "out", options, workers=1)
    same_but_for_the_inputs = contents(tmp_path / "full")
    assert same_but_for_the_inputs == contents(complete)


def test_a_full_disk_in_a_worker_process(inputs, tmp_path):
    message = r"--output .*: cannot be written: File too large.*Make room"
    with file_sizes_up_to(3000), pytest.raises(DataError, match=message):
        prepare([inputs], tmp_path / "out", BYTES, workers=2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_other_errors_of_a_disk(inputs, tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("megatron_mtp.data.prepare.spool.SpoolWriter._write_run", fail)
    with pytest.raises(DataError) as info:
        prepare([inputs], tmp_path / "out", BYTES, workers=1)
    assert os.strerror(number) in str(info.value)
    assert ("Make room" in str(info.value)) == (number != errno.EIO)


def run_and_die(inputs, output, options, module, name, at):
    """In a child: `prepare` that ends at once at the call number `at` of a function. Returns its exit code."""

    def child():
        real, calls = getattr(module, name), []

        def die(*args, **kwargs):
            calls.append(args)
            if len(calls) == at:
                os._exit(9)
            return real(*args, **kwargs)

        setattr(module, name, die)
        prepare([inputs], output, options, workers=1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("name", ["fsync", "replace", "unlink", "rmdir"])
def test_killed_at_any_moment_it_leaves_nothing_that_a_later_run_does_not_remove(inputs, tmp_path, name):
    options = PrepareOptions(tokenizer="bytes", shards=2, shuffle=1)
    prepare([inputs], tmp_path / "complete" / "out", options, workers=1)
    complete, kills = contents(tmp_path / "complete"), 0
    for at in range(1, 40):
        folder = tmp_path / f"{name}{at}"
        # every fourth call of the many unlinks is enough
        code = run_and_die(inputs, folder / "out", options, os, name, at if name != "unlink" else 4 * at)
        left = {path.name for path in folder.iterdir()}
        assert left <= {*complete, "out.prepare"}, "a temporary file beside the data"
        if code == 0:
            break
        assert code == 9
        kills += 1
        prepare([inputs], folder / "out", options, workers=1)
        assert contents(folder) == complete
        shutil.rmtree(folder)
    assert (code, kills >= 1) == (0, True)


def test_temporary_files_lie_in_the_work_folder(inputs, tmp_path, monkeypatch):
    real, moves = os.replace, []
    monkeypatch.setattr(os, "replace", lambda source, target: moves.append((source, target)) or real(source, target))
    prepare([inputs], tmp_path / "out", PrepareOptions(train_vocab_size=260), workers=1)
    published = [Path(source).parent.name for source, target in moves if Path(target).parent == tmp_path]
    assert published == ["out.prepare"] * 4  # tokenizer.json, .bin, .json, .idx


def test_unfinished_work_of_another_plan_or_process_is_kept_by_a_finished_run(inputs, tmp_path):
    made = prepare([inputs], tmp_path / "out", BYTES, workers=1)
    work = tmp_path / "out.prepare"
    for plan, name in (("another plan", "input_000000.tokens"), (None, "notes.txt")):
        work.mkdir()
        (work / name).write_text("x")
        if plan:
            (work / "plan").write_text(plan)
        assert prepare([inputs], tmp_path / "out", BYTES, workers=1).was_done
        assert (work / name).exists()
        shutil.rmtree(work)
    assert made.counts.documents == 240


def test_a_folder_of_the_user_is_not_taken_for_the_work_folder(inputs, tmp_path):
    (tmp_path / "out.prepare").mkdir()
    (tmp_path / "out.prepare" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"out\.prepare: is not a work folder of `prepare`: it holds thesis\.tex"):
        prepare([inputs], tmp_path / "out", BYTES, workers=1)
    assert [path.name for path in (tmp_path / "out.prepare").iterdir()] == ["thesis.tex"]


def test_an_output_inside_the_folder_of_inputs_is_no_input(inputs, monkeypatch):
    options = PrepareOptions(train_vocab_size=260)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_run, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare([inputs], inputs / "out", options, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_run, "train_on", lambda *_: pytest.fail("it started over"))
        made = prepare([inputs], inputs / "out", options, workers=1)
    assert made.counts.documents == 240
    assert prepare([inputs], inputs / "out", options, workers=1).was_done


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--shards", "0"], "--shards = 0: must be from 1 to 10,000"),
        (["--shards", "1000000000"], "--shards = 1000000000: must be from 1 to 10,000"),
        (["--shards", "241"], "--shards = 241: is too large for 240 documents"),
        (["--shards", "200", "--shuffle", "1"], "--shards = 200: is too large for 240 documents"),
        (["--shuffle", "-1"], "--shuffle = -1: must be from 0"),
        (["--shuffle", str(2**63)], "--shuffle = 9223372036854775808: must be from 0"),
        (["--memory-mib", "1" * 400], "--memory-mib = 111"),
        (
            ["--train-tokenizer", "--vocab-size", "10000000000"],
            "10000000000: must be from 257 to 1,048,576",
        ),
        (["--train-tokenizer", "--vocab-size", "300", "--tokenizer", "bytes"], "--tokenizer = 'bytes'"),
        (["--tokenizer", "null:10000000000"], "tokenizer.vocab_size = 10000000000"),
        (["--tokenizer", "null:" + "9" * 5000], "write null:VOCAB"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_absurd_numbers_are_refused(inputs, tmp_path, command, options, rule):
    given = [] if {"--tokenizer", "--train-tokenizer"} & set(options) else ["--tokenizer", "bytes"]
    code, said = command(inputs, "--output", tmp_path / "out", "--workers", 1, *given, *options)
    assert code == 2
    assert rule in said
    assert not list(tmp_path.glob("out_*"))


def test_documents_are_spread_over_as_many_data_sets_as_there_are_documents(inputs, tmp_path):
    (inputs / "1.jsonl").unlink(), (inputs / "2.jsonl").unlink(), (inputs / "3.jsonl").unlink()
    made = prepare([inputs], tmp_path / "out", PrepareOptions(tokenizer="bytes", shards=60), workers=1)
    assert len(made.prefixes) == 60


def test_pipes_sockets_and_devices_are_no_inputs(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jsonl")
    (tmp_path / "null.jsonl").symlink_to("/dev/null")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name in ("pipe", "socket", "null"):
        with pytest.raises(DataError, match=rf"{name}\.jsonl: cannot be read \(it is not a regular file\)"):
            list_inputs([f"{name}.jsonl"])
        with pytest.raises(DataError, match=rf"tokenizer {name}\.jsonl: cannot be read \(it is not a regular file\)"):
            tokenizer_from_spec(f"{name}.jsonl")
    for name in ("loop.jsonl", "n" * 300, "a\0.jsonl"):
        with pytest.raises(DataError):
            list_inputs([name])
    with pytest.raises(DataError, match="holds no file"):
        list_inputs([tmp_path])


def test_lines_that_are_nested_too_deeply_or_too_long_are_bad_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "one"}', "[" * 100_000, '{"text": ' + '{"a":' * 100_000, '{"text": "two"}']
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: is nested too deeply"):
        list(read_documents(path))
    bad = []
    assert [d.text for d in read_documents(path, on_bad_line=bad.append)] == ["one", "two"]
    assert [text.rsplit(": ")[-1] for text in bad] == ["is nested too deeply"] * 2
    monkeypatch.setattr("megatron_mtp.data.prepare.jsonl._LINE_BYTES", 40)
    lines = ['{"text": "one"}', '{"text": "' + "x" * 200 + '"}', '{"text": "' + "y" * 28 + '"}', '{"text": "two"}']
    assert [len(line) for line in lines] == [15, 212, 40, 15]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: is longer than 40 bytes"):
        list(read_documents(path))
    bad = []
    assert [(d.line, d.text) for d in read_documents(path, on_bad_line=bad.append)] == [(1, "one"), (4, "two")]
    path.write_text(lines[0] + "\n" + lines[1])
    assert [d.text for d in read_documents(path, on_bad_line=bad.append)] == ["one"]


def test_a_key_with_a_slash_gives_a_name_without(inputs, tmp_path):
    made = prepare([inputs], tmp_path / "out", PrepareOptions(tokenizer="bytes", json_key="a/b"), workers=1)
    assert made.prefixes == [f"{tmp_path}/out_a_b_document"]
    assert made.counts.documents == 240
    assert Path(f"{made.prefixes[0]}.idx").is_file()


def test_a_damaged_spool_is_named(inputs, tmp_path, monkeypatch):
    for ending, change in ((".lengths.npy", b""), (".bounds.npy", b"x"), (".json", b"[]"), (".tokens", b"")):
        with monkeypatch.context() as patch:
            patch.setattr(prepare_run, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare([inputs], tmp_path / "out", BYTES, workers=1)
        (tmp_path / "out.prepare" / f"input_000002{ending}").write_bytes(change)
        message = r"input_000002(\.\w+\.npy)?: is damaged.* Delete .*out\.prepare and run again"
        with pytest.raises(DataError, match=message):
            prepare([inputs], tmp_path / "out", BYTES, workers=1)
        shutil.rmtree(tmp_path / "out.prepare")


def test_more_inputs_than_a_process_may_open_files(inputs, tmp_path):
    for number in range(100):
        (inputs / f"more{number}.jsonl").write_text('{"text": "a"}\n')
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 40, before[1]))
    try:
        made = prepare([inputs], tmp_path / "out", PrepareOptions(tokenizer="bytes", shuffle=1, shards=2), workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert made.counts.documents == 340


def test_options_from_python_are_checked_too():
    with pytest.raises(ConfigError) as info:
        PrepareOptions(tokenizer="x", shards=10**9, shuffle=-1, train_vocab_size=2**21, memory_mib=10**400)
    assert [problem.fields for problem in info.value.problems] == [
        ("--shards",),
        ("--shuffle",),
        ("--memory-mib",),
        ("--vocab-size",),
        ("--tokenizer",),
    ]
