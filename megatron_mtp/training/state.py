"""The train state. It is defined in `checkpoint/train_state.py`, below everything that writes a checkpoint."""

from megatron_mtp.checkpoint.train_state import TrainState

__all__ = ["TrainState"]
