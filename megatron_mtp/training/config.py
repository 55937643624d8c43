"""The config container under the path Megatron-Bridge's users import it from."""

from megatron_mtp.config import ConfigContainer

__all__ = ["ConfigContainer"]
