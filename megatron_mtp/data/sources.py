"""From the dataset section of a config to the sources of a run: mock data or blends of indexed data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.blend import SPLITS, Blend, Budget, has_addresses, is_mock, parse_blend, valid_names
from megatron_mtp.config.sections import DatasetConfig
from megatron_mtp.data.blend import BlendedSource
from megatron_mtp.data.corpus import Corpus, split_range
from megatron_mtp.data.data_file import sampled_hash
from megatron_mtp.data.fim import FillInTheMiddle, TokenCutter, find_sentinels
from megatron_mtp.data.indexed import IndexedReader
from megatron_mtp.data.mock import MockSource
from megatron_mtp.data.object_file import ObjectCache, open_file
from megatron_mtp.data.sidecar import Sidecar
from megatron_mtp.data.source import SampleSource
from megatron_mtp.data.tokenizer import Tokenizer, configured_tokenizer, end_of_document, resolve_vocab_size
from megatron_mtp.errors import ConfigError, DataError

GIB = 2**30


def open_sources(
    cfg: ConfigContainer, vocab_size: int, cache: ObjectCache | None = None
) -> tuple[SampleSource, dict[str, SampleSource]]:
    """The training source, and the validation sources by name (`valid_names`); none if validation.eval_iters is 0.

    Blends are opened and checked; their indices are not built yet (`BlendedSource.build_indices`).

    Args:
        cache: of data in object storage, see `object_cache`.

    Raises:
        DataError: lists every problem with the files, one on a line.
    """
    opener = _Opener(cfg, vocab_size, cache)
    named = cfg.dataset.valid_sets or {}
    sources: dict[str, SampleSource] = {}
    for name in (SPLITS[0], *(valid_names(cfg.dataset) if cfg.validation.eval_iters else ())):
        if name in named:
            sources[name] = opener.blend(parse_blend(named[name]), name, split=None)
        elif is_mock(cfg.dataset):
            sources[name] = opener.mock(name)
        else:
            sources[name] = opener.blend(*_main_blend(cfg.dataset, name))
    if problems := opener.problems + opener.cache_problems():
        raise DataError("\n".join(dict.fromkeys(problems)))
    return sources.pop(SPLITS[0]), sources


def check_data(cfg: ConfigContainer) -> None:
    """Opens all the data of a run to find mistakes. Needs no torch, and builds and writes nothing, but for the cache of
    data in object storage.

    Raises:
        DataError: lists every problem with the files, one on a line.
    """
    with object_cache(cfg.dataset) as cache:
        open_sources(cfg, resolve_vocab_size(cfg), cache)


def data_fingerprints(cfg: ConfigContainer) -> dict[str, str]:
    """Prefix -> hash of its files, for the training data in the order of the blend; see `data_file.sampled_hash`.

    Empty for mock data, and where a file cannot be read: `check_data` says which.
    """
    if is_mock(cfg.dataset):
        return {}
    blend, _, _ = _main_blend(cfg.dataset, SPLITS[0])
    suffixes = [""] if cfg.dataset.loss_mask_suffix is None else ["", cfg.dataset.loss_mask_suffix]
    endings = [f"{suffix}{ending}" for suffix in suffixes for ending in (".bin", ".idx")]
    try:
        with object_cache(cfg.dataset) as cache:
            return {
                prefix: sampled_hash(open_file(f"{prefix}{ending}", "", cache) for ending in endings)
                for prefix in blend.prefixes
            }
    except (OSError, DataError):
        return {}


@contextmanager
def object_cache(dataset: DatasetConfig) -> Iterator[ObjectCache | None]:
    """The cache of a run's data in object storage; None: it has no such data.

    Raises:
        DataError: its folder cannot be written.
    """
    if not has_addresses(dataset):
        yield None
        return
    assert dataset.object_storage_cache_path is not None, "finalize asks for it"
    cache = ObjectCache(Path(dataset.object_storage_cache_path), int(dataset.object_storage_cache_gib * GIB))
    with closing(cache):
        yield cache


def _main_blend(dataset: DatasetConfig, which: str) -> tuple[Blend, str, str | None]:
    """Blend, name and split string (None: all of each prefix) of the training or the main validation set."""
    if dataset.blend_per_split is None:
        return parse_blend(dataset.blend), which, dataset.split
    return parse_blend(dataset.blend_per_split[SPLITS.index(which)]), which, None


class _Opener:
    """Opens sources, each file once, and collects their problems."""

    def __init__(self, cfg: ConfigContainer, vocab_size: int, cache: ObjectCache | None):
        self.vocab_size, self.seed = vocab_size, cfg.rng.seed
        self.seq_length = cfg.model.seq_length
        tokenizer = configured_tokenizer(cfg)
        self.eod = end_of_document(tokenizer, vocab_size)
        self.fingerprint = None if tokenizer is None or tokenizer.kind == "null" else tokenizer.fingerprint()
        self.mask_suffix, data = cfg.dataset.loss_mask_suffix, cfg.dataset
        self.masks_by_eod = data.eod_mask_loss or data.reset_attention_mask or data.reset_position_ids
        self.fim = self._fim(cfg, tokenizer) if data.fim_rate else None
        self.budgets = data.budgets or {}
        self.problems: list[str] = []
        self.readers: dict[str, IndexedReader | None] = {}
        self.cache, self.index_bytes = cache, 0

    def _fim(self, cfg: ConfigContainer, tokenizer: Tokenizer | None) -> Callable[[str], FillInTheMiddle | None]:
        """Training prefix -> how its documents are rearranged."""
        data, sentinels = cfg.dataset, find_sentinels(cfg.dataset, tokenizer)
        if max(sentinels) >= self.vocab_size:
            raise ConfigError(
                f"dataset.fim_rate = {data.fim_rate:g}: a sentinel has the id {max(sentinels)}, outside the "
                f"{self.vocab_size} ids of the model (model.vocab_size). Raise model.vocab_size, or name others in "
                "dataset.fim_tokens."
            )
        cutter = TokenCutter(tokenizer) if data.fim_cut == "character" and tokenizer is not None else None

        def rule(prefix: str) -> FillInTheMiddle | None:
            name = Path(prefix).name
            if data.fim_prefixes is not None and name not in data.fim_prefixes:
                return None
            return FillInTheMiddle(
                rate=data.fim_rate,
                spm_rate=data.fim_spm_rate,
                sentinels=sentinels,
                eod=self.eod,
                seed=self.seed,
                name=name,
                cutter=cutter,
                has_sentinel_loss=data.fim_sentinel_loss,
            )

        return rule

    def mock(self, which: str) -> MockSource:
        return MockSource(self.vocab_size, self.seq_length, self.eod, self.seed, which)

    def blend(self, blend: Blend, which: str, split: str | None) -> BlendedSource:
        """The mixture, without the corpora that have problems."""
        corpora = [corpus for prefix in blend.prefixes if (corpus := self._corpus(prefix, which, split))]
        limits = None if which != SPLITS[0] or not self.budgets else [self._limit(corpus) for corpus in corpora]
        return BlendedSource(corpora, blend.weights, self.seed, limits)

    def _limit(self, corpus: Corpus) -> int | None:
        """Samples that the run draws from a training corpus at most; None: any number."""
        name = Path(corpus.reader.prefix).name
        if name not in self.budgets:
            return None
        limit = Budget.parse(self.budgets[name]).samples(corpus.num_samples, self.seq_length)
        if not limit:
            self.problems.append(
                f"dataset.budgets.{name} = {self.budgets[name]}: is less than one sample of {self.seq_length} tokens "
                "(model.seq_length). Raise it, or leave the data set out of the blend."
            )
        return limit

    def _corpus(self, prefix: str, which: str, split: str | None) -> Corpus | None:
        try:
            reader = self._reader(prefix)
            if reader is None:
                return None
            documents = (0, len(reader)) if split is None else split_range(split, which, len(reader))
            targets = self._opened(f"{prefix}{self.mask_suffix}") if self.mask_suffix else None
            fim = self.fim(prefix) if self.fim is not None and which == SPLITS[0] else None
            return Corpus(reader, documents, which, self.seq_length, self.eod, self.seed, targets, fim)
        except DataError as error:
            self.problems.append(str(error))
            return None

    def _reader(self, prefix: str) -> IndexedReader | None:
        """The open files; None if they are damaged, which is recorded the first time."""
        if prefix not in self.readers:
            self.readers[prefix] = None
            reader = self.readers[prefix] = self._opened(prefix)
            if sidecar := Sidecar.load(prefix):
                eod = self.eod if self.masks_by_eod else None
                self.problems += sidecar.problems(reader, self.vocab_size, self.fingerprint, eod)
        return self.readers[prefix]

    def _opened(self, prefix: str) -> IndexedReader:
        reader = IndexedReader(prefix, self.cache)
        self.index_bytes += reader.idx_size if reader.is_remote else 0
        return reader

    def cache_problems(self) -> list[str]:
        """Whether the cache has room for tokens beside the indices, which are in use all the time."""
        if self.cache is None or 2 * self.index_bytes <= self.cache.blocks.limit:
            return []
        return [
            f"dataset.object_storage_cache_gib = {self.cache.blocks.limit / GIB:g}: the indices (.idx) of the data in "
            f"object storage take {self.index_bytes / GIB:.3g} GiB, and may take half of the cache. Raise it to at "
            f"least {2 * self.index_bytes / GIB:.3g}."
        ]
