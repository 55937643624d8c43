"""Config sections, checks across fields, overrides, YAML. Imports neither torch nor megatron."""

from megatron_mtp.config.container import ConfigContainer

__all__ = ["ConfigContainer"]
