"""Damaged and malicious files and options, 300 of them from seeds: one clear error at most, and soon.

Each kind below writes files into a folder and returns what opens them. Anything but the project's own errors fails, as
does an opening that takes more than LIMIT_S. Damage that can be seen (in an index, a sidecar, a cache) must not give
other samples than before.
"""

from __future__ import annotations

import base64
import functools
import gzip
import io
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard

from megatron_mtp.cli.main import main
from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.check import check_files
from megatron_mtp.data.indexed import IndexedWriter
from megatron_mtp.data.prepare import run as prepare_run
from megatron_mtp.data.prepare.bpe import train_bpe
from megatron_mtp.data.prepare.jsonl import read_documents
from megatron_mtp.data.prepare.run import PrepareOptions, prepare
from megatron_mtp.data.sources import open_sources
from megatron_mtp.data.tokenizer import tokenizer_from_spec
from megatron_mtp.errors import DataError, MegatronMTPError

pytestmark = pytest.mark.unit
CASES, FAST, LIMIT_S = 300, 60, 5.0
Open = Callable[[], object]

ODD_VALUES = [
    None, True, -1, 0, 2**31, 2**63, 2**64, 1e308, float("nan"), float("inf"), "", "\0", "\ud800", "é" * 300, [], {},
    [[]], {"": None}, "../../etc/passwd", "/dev/zero", "!!python/object:os.system x", "x" * 100_000, 10**400,
]  # fmt: skip
TEXTS = ["plain words ", "Grüße, 世界 👋 ", "\u2028\x00\x1b[31m ", "1 2 3 4 5 ", "<|endoftext|> </s> "]


def damaged(rng: random.Random, content: bytes) -> bytes:
    """`content` after one to three accidents."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0:
                del out[at:]
            case 1:
                out[at:at] = rng.randbytes(rng.choice([1, 8, 1000]))
            case 2:
                out[at : at + rng.choice([1, 4, 64])] = b""
            case 3:
                out[at : at + 4096] = bytes(4096)
            case 4:
                out += out[:at]
            case _:
                if at < len(out):
                    out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def with_odd_values(rng: random.Random, data: object) -> object:
    """JSON data with one to three nodes replaced, left out or doubled."""
    for _ in range(rng.randint(1, 3)):
        holders = [node for node in nodes(data) if isinstance(node, dict | list) and node]
        if not holders:
            return rng.choice(ODD_VALUES)
        holder = rng.choice(holders[:1] + holders[-40:] + rng.sample(holders, min(5, len(holders))))
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        if rng.random() < 0.3:
            del holder[key]
        else:
            holder[key] = rng.choice(ODD_VALUES)
    return data


def nodes(data: object) -> list[object]:
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return [data, *itertools.chain.from_iterable(map(nodes, children))]


def as_json(data: object) -> bytes:
    return json.dumps(data).encode()


# --- text for `prepare`


def lines(rng: random.Random) -> bytes:
    """JSONL with bad lines among the good ones, in some encoding."""
    out = [json.dumps({"text": rng.choice(TEXTS) * rng.randint(1, 50)}) for _ in range(rng.randint(1, 60))]
    bad = [
        "[" * 100_000,
        '{"text": ' * 5_000,
        json.dumps({"text": rng.choice([value for value in ODD_VALUES if value != 10**400])}),
        '{"text": ' + "9" * 5000 + "}",
        '{"text": NaN}',
        '{"text": "a", "text": 5}',
        '{"txet": "a"}',
        '{"text": "' + "long " * 400_000 + '"}',
        "\0" * 5000,
        "null",
        "\ufeff" + '{"text": "a"}',
    ]
    for _ in range(rng.choice([0, 1, 3])):
        out.insert(rng.randrange(len(out) + 1), rng.choice(bad))
    text = rng.choice(["\n", "\n", "\r\n", "\r", "\n\n \n"]).join(out)
    return text.encode(rng.choice(["utf-8", "utf-8", "utf-8", "utf-16", "utf-32-be", "utf-7", "latin-1"]), "replace")


def prepared(rng: random.Random, folder: Path, source: Path, **options: object) -> Open:
    chosen = {"tokenizer": "bytes", "skip_bad_lines": rng.random() < 0.7, "shuffle": rng.choice([None, 1])} | options
    return lambda: prepare([source], folder / "out", PrepareOptions(**chosen), workers=1)


def plain_text(rng: random.Random, folder: Path) -> Open:
    content = lines(rng)
    (folder / "a.jsonl").write_bytes(rng.choice([content, damaged(rng, content)]))
    return prepared(rng, folder, folder / "a.jsonl", tokenizer=rng.choice(["bytes", "null:3"]))


def packed_text(rng: random.Random, folder: Path) -> Open:
    content, ending = lines(rng), rng.choice(["gz", "zst"])
    packed = {"gz": gzip.compress, "zst": zstandard.compress}[ending](content)
    packed = rng.choice([packed[: len(packed) // 2], damaged(rng, packed), packed + b"trailing", content, b"", packed])
    (folder / f"a.jsonl.{ending}").write_bytes(packed)
    return prepared(rng, folder, folder / f"a.jsonl.{ending}")


def odd_kind_of_file(rng: random.Random, folder: Path) -> Open:
    path = folder / rng.choice(["a.jsonl", "new\nline.jsonl", "\udcff.jsonl", "-x.jsonl", "n" * 245 + ".jsonl"])
    match rng.randrange(7):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(path.name)
        case 2:
            path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/proc/self/mem", "/proc/self/environ", "/absent"]))
        case 3:
            path.mkdir()
        case 4:
            path.touch()
        case 5:
            path.write_bytes(lines(rng))
            (folder / "out.prepare").write_text("not a folder")
        case _:
            path.write_bytes(lines(rng))
            (folder / "out.prepare").mkdir()
            (folder / "out.prepare" / rng.choice(["plan", "lock", "shard_00000.json"])).mkdir()
    return prepared(rng, folder, rng.choice([path, folder]))


def odd_options(rng: random.Random, folder: Path) -> Open:
    (folder / "a.jsonl").write_bytes(b'{"text": "x", "a/b": "y", "": "z"}\n' * 30)
    number = ["0", "-1", "1", "7", "31", "300", "1048576", "9" * 19, "9" * 5000, "1.5", "1e3", "nan", "x", ""]
    values = {
        "--output": [*(str(folder / name) for name in ("deep/o", "a.jsonl/o", "n" * 260, "o\n", "\udcfe")), "/proc/o"],
        "--tokenizer": ["null:", "null:1", "null:²", "", "/dev/zero", str(folder), f"tiktoken:{folder}/a.jsonl"],
        "--json-key": ["a/b", "", "..", "\n", "n" * 300],
        "--shards": number,
        "--shuffle": number,
        "--memory-mib": number,
        "--vocab-size": number,
        "--workers": ["0", "-1", "1", "9" * 30],
    }  # fmt: skip
    given = {"--output": str(folder / "o"), "--tokenizer": "bytes", "--workers": "1"}
    for option in rng.sample(list(values), 2):
        given[option] = rng.choice(values[option])
    flags = ["--train-tokenizer"] * ("--vocab-size" in given) + ["--overwrite"] * rng.randrange(2)
    return command("prepare", folder / "a.jsonl", *itertools.chain.from_iterable(given.items()), *flags)


def unfinished_work(rng: random.Random, folder: Path) -> Open:
    """The work folder of a stopped run, damaged."""
    (folder / "a.jsonl").write_bytes(b'{"text": "some words"}\n' * 50)
    options = PrepareOptions(tokenizer="bytes", shards=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_run, rng.choice(["_publish", "_assemble"]), stop)
        with pytest.raises(KeyboardInterrupt):
            prepare([folder / "a.jsonl"], folder / "out", options, workers=1)
    damage_one(rng, folder / "out.prepare")
    return lambda: prepare([folder / "a.jsonl"], folder / "out", options, workers=1)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def damage_one(rng: random.Random, folder: Path, pattern: str = "*") -> Path:
    """Damages, removes or replaces one file."""
    path = rng.choice(sorted(folder.glob(pattern)))
    content = path.read_bytes()
    path.unlink()
    match rng.randrange(12):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            pass
        case 3:
            path.touch()
        case _:
            is_json = path.suffix == ".json" and rng.random() < 0.7
            path.write_bytes(as_json(with_odd_values(rng, json.loads(content))) if is_json else damaged(rng, content))
    return path


# --- data sets


def run_config(prefix: Path, cache: Path, **dataset: object) -> ConfigContainer:
    cfg = ConfigContainer()
    cfg.model.vocab_size, cfg.model.seq_length = 257, 16
    cfg.tokenizer.tokenizer_type, cfg.validation.eval_iters = "bytes", 0
    cfg.dataset.blend, cfg.dataset.path_to_cache = [str(prefix)], str(cache)
    for name, value in dataset.items():
        setattr(cfg.dataset, name, value)
    return cfg


def samples(cfg: ConfigContainer) -> list[list[int]]:
    """Every sample of an epoch; ids are not checked, so that the bytes of a damaged `.bin` may be read."""
    source, _ = open_sources(cfg, 257)
    source.build_indices(cfg.dataset.path_to_cache)
    return [source.read(i).tokens.tolist() for i in range(source.corpora[0].num_samples)]


def data_set(rng: random.Random, folder: Path) -> Open:
    """One of `.bin`, `.idx` and `.json` is damaged; only in `.bin` may that stay unseen, until its checksum is read."""
    (folder / "a.jsonl").write_bytes(b"".join(b'{"text": "%d words"}\n' % (n**9) for n in range(80)))
    prepare([folder / "a.jsonl"], folder / "out", PrepareOptions(tokenizer="bytes"), workers=1)
    prefix = folder / "out_text_document"
    cfg = run_config(prefix, folder / "cache")
    before = samples(cfg)
    shutil.rmtree(folder / "cache")
    content = {path: path.read_bytes() for path in folder.glob("out_text*")}
    path = damage_one(rng, folder, f"out_text_document.{rng.choice(['bin', 'idx', 'idx', 'idx', 'json', 'json'])}")
    is_changed = not path.is_file() or path.read_bytes() != content[path]

    def open_it() -> None:
        after = samples(cfg)
        assert after == before or path.suffix == ".bin"
        check_files(str(prefix))
        assert path.suffix == ".json" or not is_changed, "a checksum must differ"

    return open_it


def index_cache(rng: random.Random, folder: Path) -> Open:
    prefix = folder / "a"
    write_data(rng, prefix, 60)
    cfg = run_config(prefix, folder / "cache")
    before = samples(cfg)
    damage_one(rng, folder / "cache", "*.npy")

    def open_it() -> None:
        assert samples(cfg) == before

    return open_it


def loss_mask(rng: random.Random, folder: Path) -> Open:
    write_data(rng, folder / "a", 60)
    for ending in (".bin", ".idx"):
        shutil.copyfile(folder / f"a{ending}", folder / f"a_mask{ending}")
    cfg = run_config(folder / "a", folder / "cache", loss_mask_suffix="_mask")
    before = samples(cfg)
    damage_one(rng, folder, "a_mask.*")

    def open_it() -> None:
        assert samples(cfg) == before

    return open_it


def write_data(rng: random.Random, prefix: Path, count: int) -> None:
    """Documents of 1 to 30 random bytes and an end."""
    writer = IndexedWriter(str(prefix), np.dtype(np.uint16))
    for _ in range(count):
        ids = np.array([*rng.randbytes(rng.randint(1, 30)), 256])
        writer.write(ids, np.array([len(ids)]))
    writer.close()


# --- tokenizers and configs


def tokenizer_file(rng: random.Random, folder: Path) -> Open:
    kind = rng.choice(["huggingface", "huggingface", "huggingface", "config", "sentencepiece", "tiktoken", "json"])
    train_bpe(TEXTS, 280, folder / "tokenizer.json")
    spec = str(folder / "tokenizer.json")
    if kind == "huggingface":
        damage_one(rng, folder)
    elif kind == "config":
        (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}, "x": [1, {"a": null}]}')
        damage_one(rng, folder, "tokenizer_config.json")
    elif kind == "sentencepiece":
        spec = str(folder / "a.model")
        Path(spec).write_bytes(damaged(rng, sentencepiece_model()))
    else:
        ranks = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
        text = "\n".join(f"{item['token_bytes']} {item['rank']}" for item in ranks)
        spec = f"tiktoken:{folder}/a.{'json' if kind == 'json' else 'tiktoken'}"
        content = as_json(with_odd_values(rng, ranks)) if kind == "json" else damaged(rng, text.encode())
        Path(spec.partition(":")[2]).write_bytes(content)
    (folder / "a.jsonl").write_bytes(b"".join(as_json({"text": text}) + b"\n" for text in TEXTS))

    def open_it() -> None:
        tokenizer = tokenizer_from_spec(spec)
        assert tokenizer.eod < tokenizer.vocab_size
        prepare([folder / "a.jsonl"], folder / "out", PrepareOptions(tokenizer=spec, skip_bad_lines=True), workers=1)
        tokenizer.decode(list(range(min(tokenizer.vocab_size, 300))))

    return open_it


@functools.cache
def sentencepiece_model() -> bytes:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:2] * 20),
        model_writer=file,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return file.getvalue()


YAML = """\
model: {num_layers: 4, hidden_size: 64, mtp_num_layers: 1}
train:
  global_batch_size: 8
  micro_batch_size: 1
optimizer: {lr: 1e-3}
dataset: {blend: [[a, b], [0.5, 0.5]], split: "9,1,0"}
"""
YAML_PARTS = [
    "!!python/object/apply:os.system [exit]", "!!bool x", "!!map [1]", "!!int words", "!!binary '@'", "!!timestamp 1",
    "&a [*a]", "*a", "<<: *a", "${oc.env:HOME}", "[" * 20_000, "{a: " * 3_000, "1:30", "0x10", "9" * 5000, "1e999",
    "? [a, b] : c", "--- x\n---\n", "|\n  text", "\t", "\0", "\u2028", "'", "%YAML 9.9\n", "@x", "`x`", "null", "~",
    "{1: 2}", "{null: 1}", "{[a]: 1}", "{a: 1, a: 2}", "x" * 200_000, "-9223372036854775809", "true", ".nan", "[]",
]  # fmt: skip


def config_file(rng: random.Random, folder: Path) -> Open:
    path, text = folder / "run.yaml", YAML
    if rng.random() < 0.7:
        for word in rng.sample(["4", "64", "8", "1e-3", "num_layers", "model", "[a, b]", "0.5"], rng.randint(1, 2)):
            text = text.replace(word, rng.choice(YAML_PARTS), 1)
        content = text.encode(rng.choice(["utf-8", "utf-8", "utf-16", "latin-1"]), "replace")
    else:
        content = damaged(rng, text.encode())
    path.write_bytes(content)
    if rng.random() < 0.05:
        path.unlink()
        path.mkdir()
    return command("show", "tiny_dense", "--config", path)


def command(*arguments: object) -> Open:
    """A command in this process; it must end with a code of success or of a mistake."""

    def call() -> None:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert ended.value.code in (None, 0, 2), ended.value.code

    return call


KINDS = [
    plain_text, data_set, packed_text, tokenizer_file, config_file, data_set, odd_kind_of_file, odd_options,
    tokenizer_file, unfinished_work, config_file, index_cache, loss_mask,
]  # fmt: skip


@pytest.mark.timeout(60)  # for a pipe that is waited for
@pytest.mark.parametrize(
    "case", [case if case < FAST else pytest.param(case, marks=pytest.mark.slow) for case in range(CASES)]
)
def test_hostile_files_give_one_of_our_errors_and_soon(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(case)
    open_it = KINDS[case % len(KINDS)](rng, tmp_path)
    began = time.process_time()
    with suppress(MegatronMTPError):
        open_it()
    assert time.process_time() - began < LIMIT_S


@pytest.mark.slow
def test_an_archive_of_one_endless_line_takes_time_in_proportion(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "' + b"a" * 200_000_000))
    began = time.process_time()
    with pytest.raises(DataError, match="is not JSON"):
        list(read_documents(tmp_path / "a.jsonl.zst"))
    assert time.process_time() - began < 2 * LIMIT_S
