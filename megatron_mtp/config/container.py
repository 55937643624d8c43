"""The config of a run: all sections, and what can be done with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from megatron_mtp.config import serialize
from megatron_mtp.config.finalize import finalize
from megatron_mtp.config.sections.run import RunConfig


class ConfigContainer(RunConfig):
    """Everything a run needs. A recipe returns one; change fields, then `finalize()` derives, checks and freezes."""

    __slots__ = ()

    def finalize(self, world_size: int | None = None) -> Self:
        """Derives, checks across fields and freezes; see `megatron_mtp.config.finalize.finalize`."""
        return finalize(self, world_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return serialize.to_dict(self)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """YAML text, also written to `path` if it is given."""
        return serialize.to_yaml(self, path)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """A config from plain data; what is not given keeps its default.

        Raises:
            ConfigError: unknown names or values of the wrong type, all of them.
        """
        cfg = cls()
        serialize.merge(cfg, data, origin="config")
        return cfg

    @classmethod
    def from_yaml(cls, text_or_path: str | Path) -> Self:
        """A config from YAML text, or from a file if a Path (or a name that ends in .yaml or .yml) is given.

        Raises:
            ConfigError: the file cannot be read, or as `from_dict`.
        """
        return cls.from_dict(serialize.read_yaml(text_or_path) or {})
