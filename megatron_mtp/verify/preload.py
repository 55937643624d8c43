"""Imported once by the fork server of `verify`, so that workers start in a tenth of a second and print no notices."""

import warnings

from megatron_mtp.observe.logs import silence_noise

silence_noise()
# Megatron-Core advises on GPU speed and memory, once for each layer of each layout.
warnings.filterwarnings("ignore", category=UserWarning, module="megatron.core")

import megatron_mtp.verify.measure  # noqa: E402, F401
