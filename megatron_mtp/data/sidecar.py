"""The `<prefix>.json` next to a data set: its contents and tokenizer, so that a mix-up is found before a run."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

from megatron_mtp.data.files import stat_file, write_atomically
from megatron_mtp.data.indexed import IndexedReader, IndexedWriter, token_dtype
from megatron_mtp.errors import DataError
from megatron_mtp.storage.place import place

_TYPES = {"str": str, "int": int, "bool": bool, "list[str]": list}


@dataclass(kw_only=True, slots=True)
class Sidecar:
    """Facts that `megatron-mtp prepare` records about one prefix. Other data has no sidecar and is not checked."""

    tokenizer_type: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod: int
    append_eod: bool
    num_documents: int
    num_tokens: int
    largest_id: int
    bin_bytes: int
    idx_bytes: int
    plan: str
    """Hash of the inputs and options of `prepare`."""
    sources: list[str] = field(default_factory=list)
    bin_sha256: str = ""
    """Checksum of the `.bin` in hex; empty: it was made before checksums were recorded."""
    idx_sha256: str = ""

    def save(self, prefix: str, scratch: Path | None = None) -> None:
        """Writes `<prefix>.json` atomically. For `scratch` see `files.replacing`."""
        write_atomically(Path(f"{prefix}.json"), json.dumps(asdict(self), indent=1).encode(), scratch)

    @classmethod
    def load(cls, prefix: str) -> Sidecar | None:
        """Reads `<prefix>.json`, of a path or an address; None if it does not exist.

        Raises:
            DataError: it cannot be read.
        """
        path = place(f"{prefix}.json")
        try:
            if isinstance(path, Path):
                stat_file(path)
            values = json.loads(path.read_bytes())
            optional = {f.name for f in fields(cls) if f.default is not MISSING or f.default_factory is not MISSING}
            given = {f.name: values[f.name] for f in fields(cls) if f.name not in optional or f.name in values}
            for f in fields(cls):
                if f.name in given and type(given[f.name]) is not _TYPES[str(f.type)]:
                    raise ValueError(f"{f.name} is {type(given[f.name]).__name__}, not {f.type}")
            return cls(**given)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            is_hidden = isinstance(error, PermissionError) and not isinstance(path, Path)
            hint = " Who may not list a bucket (s3:ListBucket) gets this answer for what is missing." * is_hidden
            raise DataError(f"{path}: cannot be read ({error.strerror}).{hint}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}: is not a sidecar of `megatron-mtp prepare` ({error!r}). Prepare the data again."
            ) from error

    def of_files(self, writer: IndexedWriter, counts: tuple[int, int], largest_id: int) -> Sidecar:
        """The sidecar of what `writer` has written; what else it says is as here.

        Args:
            writer: closed.
            counts: documents and tokens.
        """
        return replace(
            self,
            num_documents=counts[0],
            num_tokens=counts[1],
            largest_id=largest_id,
            bin_bytes=Path(f"{writer.prefix}.bin").stat().st_size,
            idx_bytes=Path(f"{writer.prefix}.idx").stat().st_size,
            bin_sha256=writer.bin_sha256,
            idx_sha256=writer.idx_sha256,
        )

    def problems(self, reader: IndexedReader, vocab_size: int, fingerprint: str | None, eod: int | None) -> list[str]:
        """The reasons why this data does not fit a run.

        Args:
            reader: the open files.
            vocab_size: of the model.
            fingerprint: of the run's tokenizer; None: the run has none.
            eod: the run's end-of-document id; None: its masks do not depend on where documents end.
        """
        prefix, found = reader.prefix, self.mismatches(reader)
        if self.largest_id >= vocab_size:
            found.append(
                f"{prefix}: holds token id {self.largest_id} (tokenizer {self.tokenizer_type}, {self.vocab_size} ids), "
                f"outside the model's vocabulary of {vocab_size} ids. Set model.vocab_size = {self.vocab_size}, or "
                "prepare the data with the model's tokenizer."
            )
        if fingerprint is not None and fingerprint != self.tokenizer_fingerprint:
            found.append(
                f"{prefix}: was made by the tokenizer {self.tokenizer_fingerprint}, but the run's is {fingerprint}. "
                "Set tokenizer.tokenizer_model to the one that made the data, or prepare the data again."
            )
        elif eod is not None and self.append_eod and self.eod != eod:
            found.append(
                f"{prefix}: its documents end with id {self.eod}, but the run's end-of-document id is {eod}, by which "
                "it masks (dataset.eod_mask_loss, reset_attention_mask, reset_position_ids). Set "
                "tokenizer.tokenizer_type and tokenizer_model to the tokenizer that made the data "
                f"({self.tokenizer_fingerprint})."
            )
        return found

    def mismatches(self, reader: IndexedReader) -> list[str]:
        """The reasons why the files are not those that this sidecar was written for."""
        facts = [
            (".bin", "bytes", reader.bin_size, self.bin_bytes),
            (".idx", "bytes", reader.idx_size, self.idx_bytes),
            (".idx", "documents", len(reader), self.num_documents),
            (".idx", "tokens", str(reader.dtype), str(token_dtype(self.vocab_size))),
        ]
        return [
            f"{reader.prefix}{ending}: holds {actual} {unit}, but {reader.prefix}.json records {recorded}: the files "
            "do not belong together. Copy or prepare them again."
            for ending, unit, actual, recorded in facts
            if actual != recorded
        ]
