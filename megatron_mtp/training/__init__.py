"""Setup, the loop, one step, schedules, train state."""

from megatron_mtp.observe.logs import silence_noise

# Before the modules of this room import torch and megatron, which warn while they are imported.
silence_noise()
