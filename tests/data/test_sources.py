import itertools
import os
import subprocess
import sys

import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.data.loader import DataPlacement, build_data
from megatron_mtp.data.sidecar import Sidecar
from megatron_mtp.data.sources import check_data
from megatron_mtp.data.tokenizer import BytesTokenizer, resolve_vocab_size
from megatron_mtp.errors import ConfigError, DataError
from tests.data.corpora import hash_samples, write_corpus

pytestmark = pytest.mark.unit


@pytest.fixture
def cfg(tmp_path):
    for number in range(3):
        write_corpus(tmp_path / f"p{number}", [20, 30, 40] * 20, seed=number, vocab_size=256, eod=256)
    cfg = ConfigContainer()
    cfg.model.vocab_size, cfg.model.seq_length = 257, 16
    cfg.train.global_batch_size = 4
    cfg.validation.eval_iters = 2
    cfg.tokenizer.tokenizer_type = "bytes"
    cfg.dataset.blend = [[str(tmp_path / f"p{n}") for n in range(3)], None]
    cfg.dataset.split = "8,2,0"
    return cfg


def sidecar(prefix, **changes):
    values = {
        "tokenizer_type": "bytes",
        "tokenizer_fingerprint": BytesTokenizer().fingerprint(),
        "vocab_size": 257,
        "eod": 256,
        "append_eod": True,
        "num_documents": 60,
        "num_tokens": 1800,
        "largest_id": 256,
        "bin_bytes": 3600,
        "idx_bytes": os.path.getsize(f"{prefix}.idx"),
        "plan": "",
    }
    Sidecar(**(values | changes)).save(prefix)


def digests(stream, steps):
    return [digest for batch in itertools.islice(stream, steps) for _, digest in hash_samples(batch).values()]


def test_train_and_valid_come_from_different_documents_and_named_sets_are_added(cfg):
    cfg.dataset.valid_sets = {"other": [cfg.dataset.blend[0][2]]}
    data = build_data(cfg, DataPlacement(), 1)
    assert data.valid_names == ("valid", "other")
    train = set(digests(data.train(), 100))
    assert not train & set(digests(data.valid("valid"), 2))
    assert digests(data.valid("other"), 2) == digests(data.valid("other"), 2)
    data.close()


def test_blend_per_split(cfg):
    prefixes = cfg.dataset.blend[0]
    cfg.dataset.blend, cfg.dataset.blend_per_split = None, [[prefixes[:2], [1, 3]], [prefixes[2:], None], None]
    data = build_data(cfg, DataPlacement(), 0)
    ids = [int(i) for batch in itertools.islice(data.train(), 50) for i in batch.sample_ids]
    assert sum(i >= 112 for i in ids) == 150  # 112 samples in the first prefix; three quarters from the second
    assert data.valid_names == ("valid",)
    data.close()
    cfg.dataset.blend_per_split = [[prefixes, None], None, None]
    assert build_data(cfg, DataPlacement(), 0).valid_names == ()


def test_all_problems_are_reported_at_once_and_nothing_is_written(cfg, tmp_path):
    (tmp_path / "p0.idx").write_bytes((tmp_path / "p0.idx").read_bytes()[:-5])
    (tmp_path / "p1.bin").unlink()
    sidecar(str(tmp_path / "p2"), largest_id=300, bin_bytes=5, tokenizer_fingerprint="huggingface-abc")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError) as info:
        check_data(cfg)
    lines = str(info.value).splitlines()
    assert len(lines) == 5
    assert "p0.idx: holds" in lines[0]
    assert "p1.bin: cannot be read" in lines[1]
    assert "holds 3600 bytes, but" in lines[2]
    assert "token id 300" in lines[3]
    assert "outside the model's vocabulary of 257" in lines[3]
    assert "tokenizer huggingface-abc, but the run's is bytes-" in lines[4]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_sidecar_that_fits_is_silent(cfg, tmp_path):
    sidecar(str(tmp_path / "p0"))
    check_data(cfg)
    cfg.model.vocab_size = None
    assert resolve_vocab_size(cfg) == 257
    check_data(cfg)
    (tmp_path / "p0.json").write_text("{}")
    with pytest.raises(DataError, match=r"p0\.json: is not a sidecar"):
        check_data(cfg)


def test_small_validation_split_is_named_unless_it_is_not_wanted(cfg):
    cfg.dataset.split = "9999,8,2"
    with pytest.raises(DataError, match=r"p0: its valid split holds 0 tokens"):
        check_data(cfg)
    cfg.validation.eval_iters = 0
    check_data(cfg)


def test_named_sets_stand_alone_where_validation_has_no_share(cfg):
    cfg.dataset.update(split="1,0,0", valid_sets={"other": [cfg.dataset.blend[0][2]]})
    data = build_data(cfg, DataPlacement(), 1)
    assert data.valid_names == ("other",)
    assert len(digests(data.valid("other"), 2)) == 8
    data.close()


@pytest.mark.parametrize("name", ["train", "validation", "a/b"])
def test_bad_names_of_validation_sets(cfg, name):
    cfg.dataset.valid_sets = {name: ["p"]}
    with pytest.raises(ConfigError, match=f"valid_sets.{name} = .* a name consists of letters"):
        cfg.finalize()


def test_ids_in_the_batch_name_prefix_and_sample(cfg):
    cfg.model.vocab_size = 200
    data = build_data(cfg, DataPlacement(), 0)
    with pytest.raises(DataError, match=r"p\d, train sample \d+: holds token id 2\d\d, outside the vocabulary of 200"):
        list(itertools.islice(data.train(), 50))
    cfg.dataset.check_token_ids = False
    list(itertools.islice(build_data(cfg, DataPlacement(), 0).train(), 5))


def test_checks_need_no_torch(cfg, tmp_path):
    code = (
        "import sys; from megatron_mtp.config import ConfigContainer\n"
        "from megatron_mtp.data.sources import check_data\n"
        f"c = ConfigContainer(); c.model.vocab_size = 300; c.model.seq_length = 16; c.dataset.split = '8,2,0'\n"
        f"c.dataset.blend = [{str(tmp_path / 'p0')!r}]; check_data(c)\n"
        "assert not {'torch', 'megatron', 'tokenizers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
