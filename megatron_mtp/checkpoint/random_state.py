"""State of every random number generator of one rank, as tensors and numbers that a safe loader can read.

Only dropout needs it: weights, data order and schedules do not draw from generators. A rank's state belongs to its
place in the layout, so it is restored only at the layout that saved it.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

RNG_KEY = "rng_state"


def random_state() -> dict[str, Any]:
    """Python, numpy, torch, the GPU, and Megatron-Core's named states for tensor parallelism."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()},
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`. A state of a GPU is left out on a machine without one."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(dict(state["tracker"]))
