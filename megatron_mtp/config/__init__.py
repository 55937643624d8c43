"""Config sections, checks across fields, overrides, and save and load of the resolved run. Imports neither torch nor megatron."""

from megatron_mtp.config.container import ConfigContainer

__all__ = ["ConfigContainer"]
