"""From a config to batches: each rank's data module builds the rank's micro-batches of every global batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.schedules import BatchSchedule
from megatron_mtp.data.batch import NO_SAMPLE, BatchRules, GlobalBatch, MicroBatch, count_targets, make_micro_batch
from megatron_mtp.data.blend import BlendedSource
from megatron_mtp.data.order import batch_positions, local_positions
from megatron_mtp.data.prefetch import Prefetcher
from megatron_mtp.data.source import Sample, SampleSource
from megatron_mtp.data.sources import object_cache, open_sources
from megatron_mtp.data.tokenizer import resolve_vocab_size
from megatron_mtp.data.uses import CorpusUse, corpus_uses
from megatron_mtp.errors import DataError


@dataclass(frozen=True, slots=True)
class DataPlacement:
    """The part of each global batch that a rank reads. Ranks that differ only in tp or pp read the same part."""

    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1


@dataclass(frozen=True, slots=True)
class BatchBuilder:
    """Builds one rank's part of global batches from one source.

    Args:
        vocab_size: every token id must be below it; None: ids are not checked.
    """

    source: SampleSource
    placement: DataPlacement
    rules: BatchRules
    micro_batch_size: int
    vocab_size: int | None

    @property
    def unit(self) -> int:
        """Samples of one micro-batch on every data-parallel rank."""
        return self.micro_batch_size * self.placement.dp_size

    def build(self, step: int, positions: np.ndarray, num_places: int | None = None) -> GlobalBatch:
        """This rank's micro-batches of the global batch at these positions, int64 [samples].

        Args:
            num_places: samples that the batch is filled up to, a multiple of `unit`; None: it is full.
        """
        size = len(positions) if num_places is None else num_places
        sample_ids = np.full(size, NO_SAMPLE, np.int64)
        sample_ids[: len(positions)] = self.source.sample_ids(positions)
        places = local_positions(size, self.micro_batch_size, self.placement.dp_rank, self.placement.dp_size)
        filler = int(sample_ids[0])
        self.source.will_read(sample_id for sample_id in sample_ids[places].flat if sample_id != NO_SAMPLE)
        micro_batches = [
            make_micro_batch([self._sample(int(sample_ids[place]), filler) for place in row], self.rules)
            for row in places
        ]
        return GlobalBatch(step, sample_ids, places, micro_batches, count_targets(micro_batches))

    def _sample(self, sample_id: int, filler: int) -> Sample:
        """The sample of this id; for NO_SAMPLE the tokens of `filler`, none of which is a target."""
        if sample_id != NO_SAMPLE:
            return self.read(sample_id)
        sample = self.read(filler)
        return replace(sample, is_target=np.zeros(len(sample.tokens), bool))

    def read(self, sample_id: int) -> Sample:
        """A sample, whose ids are checked.

        Raises:
            DataError: it cannot be read, or an id lies outside the vocabulary.
        """
        try:
            sample = self.source.read(sample_id)
        except DataError as error:
            raise DataError(f"{self.source.describe(sample_id)}: {error}") from error
        if self.vocab_size is not None:
            worst = int(sample.tokens.max()) if sample.tokens.min() >= 0 else int(sample.tokens.min())
            if not 0 <= worst < self.vocab_size:
                raise DataError(
                    f"{self.source.describe(sample_id)}: holds token id {worst}, outside the vocabulary of "
                    f"{self.vocab_size} ids (model.vocab_size). Another tokenizer made the data, or the file is "
                    "damaged: set model.vocab_size to the tokenizer's, or prepare the data again."
                )
        return sample


class DataModule:
    """The data of a run, as one rank sees it.

    Attributes:
        schedule: global batch size as a function of consumed samples.
        valid_names: names of the validation sets, as `config.blend.valid_names`; empty if the run does not evaluate.
    """

    def __init__(
        self, cfg: ConfigContainer, placement: DataPlacement, num_depths: int, vocab_size: int, pin_memory: bool
    ):
        self.schedule = BatchSchedule.of(cfg.train)
        self._cfg, self._placement, self._pin_memory = cfg, placement, pin_memory
        self._vocab_size = vocab_size if cfg.dataset.check_token_ids else None
        self._rules = BatchRules(
            num_depths=num_depths,
            mask_document_starts=cfg.dataset.eod_mask_loss,
            separate_documents=cfg.dataset.reset_attention_mask,
            reset_position_ids=cfg.dataset.reset_position_ids,
            cp_rank=placement.cp_rank,
            cp_size=placement.cp_size,
        )
        validation = cfg.validation
        self._eval_micro = validation.eval_micro_batch_size or cfg.train.micro_batch_size
        self._eval_global = validation.eval_global_batch_size or cfg.train.global_batch_size
        self._cache_scope = ExitStack()
        cache = self._cache_scope.enter_context(object_cache(cfg.dataset))
        self._train, self._valid = open_sources(cfg, vocab_size, cache)
        for source in (self._train, *self._valid.values()):
            if isinstance(source, BlendedSource):
                source.build_indices(cfg.dataset.path_to_cache)
        self._open: list[Prefetcher[GlobalBatch]] = []

    @property
    def valid_names(self) -> tuple[str, ...]:
        return tuple(self._valid)

    def uses(self, length_samples: int | None) -> dict[str, list[CorpusUse]]:
        """What a run of that many samples draws from each corpus of "train", and one evaluation of each of its sets.

        Empty lists for mock data.
        """
        found = {"train": corpus_uses(self._train, length_samples)}
        for name, source in self._valid.items():
            if self._cfg.validation.reads_once:
                found[name] = corpus_uses(_once(source), source.num_samples)
            else:
                found[name] = corpus_uses(source, self._cfg.validation.eval_iters * self._eval_global)
        return found

    def train(self, consumed_samples: int = 0, since_ramp: int | None = None) -> Prefetcher[GlobalBatch]:
        """An endless stream of global batches that starts after `consumed_samples` of the order of the data.

        Args:
            since_ramp: samples since the batch schedule began; None: it began with the order of the data.
        """
        build = self.builder(self._train, self._cfg.train.micro_batch_size).build
        return self._stream(
            build(step, positions) for step, positions in batch_positions(self.schedule, consumed_samples, since_ramp)
        )

    def valid(self, name: str = "valid") -> Prefetcher[GlobalBatch]:
        """The global batches of one evaluation, the same at each call: validation.eval_iters, or each sample once."""
        source, size = self._valid[name], self._eval_global
        if self._cfg.validation.reads_once:
            return self._stream(self._all_of(_once(source)))
        build = self.builder(source, self._eval_micro).build
        return self._stream(
            build(i, np.arange(i * size, (i + 1) * size)) for i in range(self._cfg.validation.eval_iters)
        )

    def num_valid_batches(self, name: str) -> int:
        """Global batches of one evaluation of this set."""
        return -(-self.num_valid_samples(name) // self._eval_global)

    def num_valid_samples(self, name: str) -> int:
        """Samples that one evaluation of this set reads over all ranks, one that is read again counted again."""
        if self._cfg.validation.reads_once:
            return _once(self._valid[name]).num_samples
        return self._cfg.validation.eval_iters * self._eval_global

    def _all_of(self, source: BlendedSource) -> Iterator[GlobalBatch]:
        """The first `num_samples` positions. The last batch has no more micro-batches than it needs."""
        builder, model = self.builder(source, self._eval_micro), self._cfg.model
        stages = model.pipeline_model_parallel_size if model.virtual_pipeline_model_parallel_size > 1 else 1
        unit = builder.unit * stages  # the interleaved schedule needs a multiple of the stages
        for step, first in enumerate(range(0, source.num_samples, self._eval_global)):
            positions = np.arange(first, min(first + self._eval_global, source.num_samples))
            yield builder.build(step, positions, -(-len(positions) // unit) * unit)

    def look(self, position: int) -> tuple[Sample, MicroBatch, str]:
        """The training sample at a position of the data order, alone as a micro-batch, and where it comes from."""
        sample_id = int(self._train.sample_ids(np.array([position]))[0])
        sample = self.builder(self._train, 1).read(sample_id)
        return sample, make_micro_batch([sample], self._rules), self._train.describe(sample_id)

    def close(self) -> None:
        """Ends all background threads."""
        for stream in self._open:
            stream.close()
        self._open.clear()
        self._cache_scope.close()

    def builder(self, source: SampleSource, micro_batch_size: int) -> BatchBuilder:
        """A builder of this rank's batches by the rules of the run; `verify` passes its own source."""
        return BatchBuilder(source, self._placement, self._rules, micro_batch_size, self._vocab_size)

    def _stream(self, batches: Iterator[GlobalBatch]) -> Prefetcher[GlobalBatch]:
        if self._pin_memory:
            batches = map(_pin, batches)
        self._open = [stream for stream in self._open if not stream.closed]
        self._open.append(Prefetcher(batches, self._cfg.dataset.prefetch_steps))
        return self._open[-1]


def _once(source: SampleSource) -> BlendedSource:
    assert isinstance(source, BlendedSource), "finalize refuses to read mock data once"
    return source.once()


def _pin(batch: GlobalBatch) -> GlobalBatch:
    pinned = [micro_batch.pin_memory() for micro_batch in batch.micro_batches]
    return GlobalBatch(batch.step, batch.sample_ids, batch.places, pinned, batch.num_targets)


def build_data(
    cfg: ConfigContainer, placement: DataPlacement, num_depths: int, *, pin_memory: bool = False
) -> DataModule:
    """Opens the data of a run for one rank. Every rank calls it, without collectives.

    One rank of each file system builds a missing index while the others wait for the file.

    Args:
        placement: this rank's place in the data-parallel and context-parallel groups.
        num_depths: D, the MTP depths to make targets for.
        pin_memory: place batches in page-locked memory, for a GPU.

    Raises:
        DataError: a file is missing or damaged, a split is too small, or the data does not fit the model.
    """
    return DataModule(cfg, placement, num_depths, resolve_vocab_size(cfg), pin_memory)
