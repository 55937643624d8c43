import base64
import json

import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.prepare.bpe import train_bpe
from megatron_mtp.data.tokenizer import configured_tokenizer, open_tokenizer, resolve_vocab_size, tokenizer_from_spec
from megatron_mtp.errors import ConfigError, DataError

pytestmark = pytest.mark.unit
TEXTS = ["def f(x):\n    return x + 1\n", "Grüße, 世界 👋", "a  b\t\tc", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One tokenizer file of each kind."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizers")
    train_bpe(TEXTS * 3, 280, folder / "tokenizer.json")
    with (folder / "piece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS[:3] * 20),
            model_writer=file,
            vocab_size=300,
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            minloglevel=2,
        )
    ranks = [bytes([byte]) for byte in range(256)] + [b"re", b"tu"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    (folder / "ranks.tiktoken").write_text("\n".join(lines))
    items = [{"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": ""} for r, t in enumerate(ranks)]
    (folder / "tekken.json").write_text(json.dumps(items))
    return folder


@pytest.mark.parametrize(
    ("spec", "kind", "vocab_size"),
    [
        ("{}/tokenizer.json", "huggingface", 280),
        ("{}", "huggingface", 280),
        ("{}/ranks.tiktoken", "tiktoken", 259),
        ("tiktoken:{}/tekken.json", "tiktoken", 259),
        ("bytes", "bytes", 257),
    ],
)
def test_text_comes_back(folder, spec, kind, vocab_size):
    tokenizer = tokenizer_from_spec(spec.format(folder))
    assert (tokenizer.kind, tokenizer.vocab_size) == (kind, vocab_size)
    encoded = tokenizer.encode_batch(TEXTS)
    assert [tokenizer.decode(ids) for ids in encoded] == TEXTS
    assert all(0 <= id_ < vocab_size and id_ != tokenizer.eod for ids in encoded for id_ in ids)
    assert 0 <= tokenizer.eod < vocab_size
    assert tokenizer.fingerprint() == tokenizer_from_spec(spec.format(folder)).fingerprint()


def test_sentencepiece(folder):
    tokenizer = tokenizer_from_spec(f"{folder}/piece.model")
    assert tokenizer.kind == "sentencepiece"
    encoded = tokenizer.encode_batch(TEXTS)
    assert [tokenizer.decode(ids) for ids in encoded] == TEXTS
    assert max(map(max, filter(None, encoded))) < tokenizer.vocab_size
    assert tokenizer.eod == 2


def test_null_reads_ids(folder):
    tokenizer = tokenizer_from_spec("null:50")
    assert tokenizer.encode_batch(["3 1  4", ""]) == [[3, 1, 4], []]
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.decode([3, 1])) == (50, 49, "3 1")
    with pytest.raises(ValueError, match="invalid literal"):
        tokenizer.encode_batch(["3 x"])
    with pytest.raises(ValueError, match="50"):
        tokenizer.encode_batch(["3 50"])


def test_special_tokens_in_a_text_are_text(folder):
    for spec in ("{}/tokenizer.json", "{}/ranks.tiktoken"):
        tokenizer = tokenizer_from_spec(spec.format(folder))
        (ids,) = tokenizer.encode_batch(["one<|endoftext|>two"])
        assert tokenizer.eod not in ids
        assert tokenizer.decode(ids) == "one<|endoftext|>two"


def test_fingerprint_follows_content_not_place_or_layout(folder, tmp_path):
    original = tokenizer_from_spec(f"{folder}/tokenizer.json")
    content = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "copy.json").write_text(json.dumps(content, indent=7))
    assert tokenizer_from_spec(f"{tmp_path}/copy.json").fingerprint() == original.fingerprint()
    train_bpe(TEXTS * 3, 270, tmp_path / "other.json")
    assert tokenizer_from_spec(f"{tmp_path}/other.json").fingerprint() != original.fingerprint()
    assert tokenizer_from_spec("null:50").fingerprint() != tokenizer_from_spec("null:51").fingerprint()


def test_eod_of_a_tokenizer_config_comes_first(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    extra = {**content["added_tokens"][0], "id": 280, "content": "<|stop|>"}
    content["added_tokens"].append(extra)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_from_spec(str(tmp_path)).eod == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|stop|>"}}')
    tokenizer = tokenizer_from_spec(str(tmp_path))
    assert (tokenizer.eod, tokenizer.vocab_size) == (280, 281)
    content["added_tokens"] = []
    content["model"]["vocab"] = {("x" if k == "<|endoftext|>" else k): v for k, v in content["model"]["vocab"].items()}
    content["model"]["merges"] = []
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="no end-of-document token"):
        tokenizer_from_spec(f"{tmp_path}/none")


@pytest.mark.parametrize("name", ["a.json", "a.model", "a.tiktoken"])
def test_missing_and_damaged_files_are_named(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name}: cannot be read"):
        tokenizer_from_spec(f"{tmp_path}/{name}")
    (tmp_path / name).write_text("{not a tokenizer")
    with pytest.raises(DataError, match=rf"{name}: is not a"):
        tokenizer_from_spec(f"{tmp_path}/{name}")


def test_missing_fields_are_named():
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size = None"):
        open_tokenizer("null")
    with pytest.raises(ConfigError, match=r"tokenizer\.tokenizer_model = None"):
        open_tokenizer("huggingface")
    with pytest.raises(ConfigError, match="null:VOCAB"):
        tokenizer_from_spec("null:many")


def test_vocabulary_of_the_model(folder):
    cfg = ConfigContainer()
    with pytest.raises(ConfigError, match=r"model\.vocab_size = None"):
        resolve_vocab_size(cfg)
    assert configured_tokenizer(cfg) is None
    cfg.tokenizer.vocab_size = 70
    assert resolve_vocab_size(cfg) == 70
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model = "huggingface", str(folder)
    assert resolve_vocab_size(cfg) == 280
    cfg.model.vocab_size = 512
    assert resolve_vocab_size(cfg) == 512
