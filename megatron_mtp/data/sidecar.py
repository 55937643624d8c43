"""The `<prefix>.json` next to a data set: its contents and tokenizer, so that a mix-up is found before a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from megatron_mtp.data.files import write_atomically
from megatron_mtp.errors import DataError


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

    def save(self, prefix: str) -> None:
        """Writes `<prefix>.json` atomically."""
        write_atomically(Path(f"{prefix}.json"), json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def load(cls, prefix: str) -> Sidecar | None:
        """Reads `<prefix>.json`; None if it does not exist.

        Raises:
            DataError: it cannot be read.
        """
        path = Path(f"{prefix}.json")
        try:
            values = json.loads(path.read_bytes())
            return cls(**{f.name: values[f.name] for f in fields(cls)})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: is not a sidecar of `megatron-mtp prepare` ({error!r}). Prepare the data again."
            ) from error

    def problems(self, prefix: str, bin_bytes: int, vocab_size: int, fingerprint: str | None) -> list[str]:
        """The reasons why this data does not fit a run.

        Args:
            bin_bytes: actual size of `<prefix>.bin`.
            vocab_size: of the model.
            fingerprint: of the run's tokenizer; None: the run has none.
        """
        found = []
        if bin_bytes != self.bin_bytes:
            found.append(
                f"{prefix}.bin: holds {bin_bytes} bytes, but {prefix}.json records {self.bin_bytes}: the files do not "
                "belong together. Copy or prepare them again."
            )
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
        return found
