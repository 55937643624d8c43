"""Norms of the gradient of chosen parameters, for callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mtp.errors import ConfigError, nearest
from megatron_mtp.model.sharded import gradient_ranges
from megatron_mtp.training.setup import Run

SHOWN = 3


class GradientNorms:
    """L2 norms of the gradient of chosen parameters, of the whole model and global batch, at every layout.

    They are those before clipping: the norm of all parameters together is `result.grad_norm`. Every parameter counts
    once, however many ranks hold copies of it, a tied embedding too. Gradients are read in each step and not copied.

    Example, in a callback:

        def on_train_start(self, run, state):
            self.norms = GradientNorms(run, {"grad-norm/mtp": "mtp.*", "grad-norm/layer_0": "decoder.layers.0.*"})

        def on_step_end(self, run, state, result):
            return self.norms.read()

    Args:
        run: of the callback. Every rank makes the object at the same time.
        patterns: name of a metric -> pattern of parameter names, with * for any text. Names are those of the whole
            model, the same at every layout, such as `embedding.word_embeddings.weight`, `mtp.layers.0.eh_proj.weight`,
            `decoder.layers.3.mlp.experts.7.linear_fc1.weight`. Layers and experts are counted from 0.

    Attributes:
        names: metric -> names of its parameters.

    Raises:
        ConfigError: on every rank: a pattern fits no trainable parameter.
    """

    def __init__(self, run: Run, patterns: Mapping[str, str]):
        ranges = gradient_ranges(run.engine.chunks)
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, sorted({found.name for found in ranges}))
        known = sorted({name for names in everyone for name in names})
        self.names = {label: [n for n in known if fnmatchcase(n, pattern)] for label, pattern in patterns.items()}
        for label, names in self.names.items():
            if not names:
                close = nearest(patterns[label], known) or f" Names are such as {', '.join(known[:SHOWN])}."
                raise ConfigError(f"GradientNorms: {label!r}: {patterns[label]!r} fits no trainable parameter.{close}")
        chosen = {label: set(names) for label, names in self.names.items()}
        self._ranges = [found for found in ranges if any(found.name in names for names in chosen.values())]
        # [labels, ranges]
        is_in = [[found.name in names for found in self._ranges] for names in chosen.values()]
        self._is_in = torch.tensor(is_in, dtype=torch.float64, device=run.engine.device).view(len(chosen), -1)
        self._squares: Tensor | None = None
        self._optimizer = run.engine.optimizer
        run.engine.gradients.readers.append(self._note)

    def read(self) -> dict[str, float | None]:
        """The norms of the last step, by metric; None before the first one. A collective over all ranks."""
        if self._squares is None:
            return dict.fromkeys(self.names)
        total = self._squares.clone()
        dist.all_reduce(total)
        return dict(zip(self.names, total.sqrt().tolist(), strict=True))

    @torch.no_grad()
    def _note(self) -> None:
        """This rank's part of the squared norms, in fp64: [labels]."""
        squares = self._is_in.new_zeros(0)  # this rank may have none of them
        if self._ranges:
            norms = torch._foreach_norm([found.gradient for found in self._ranges], 2, dtype=torch.float32)
            squares = torch.stack(norms).double().square()
        self._squares = (self._is_in @ squares) / float(self._optimizer.get_loss_scale()) ** 2
