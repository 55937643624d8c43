"""How the MTP layers of a run differ from those in the checkpoint that it starts from: added, dropped, or the same.

A layer is known by its number in the keys of the checkpoint: `mtp.layers.1.` is the layer of depth 2. Imports neither
torch nor megatron.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mtp.config.depths import distinct_layers

_LAYER = re.compile(r"(?:optimizer\.state\.\w+\.)?mtp\.layers\.(\d+)\.")
_HOW = {
    "fresh": "it is initialised as in a new model",
    "last_layer": "it is a copy of the trunk's last layer and final norm; its input norms{mlp} and projection are "
    "initialised as in a new model",
    "last_depth": "it is a copy of the layer of depth {source}",
}
_OF_LAYERS = frozenset({"mtp_variant", "mtp_hidden_source", "mtp_layer_mlp", "mtp_ffn_hidden_size"})


@dataclass(frozen=True, slots=True)
class DepthChange:
    """MTP layers of a checkpoint and of the run that starts from it.

    Args:
        old, new: layers with weights of their own in the checkpoint and in the run; a repeated layer counts once.
        old_depths, new_depths: depths that predict.
        init: model.mtp_new_layers_init of the run.
        has_own_mlp: the run's MTP layers have another feed-forward block than the trunk's last layer
            (model.mtp_layer_mlp), so that it cannot be copied from there.
    """

    old: int
    new: int
    old_depths: int
    new_depths: int
    init: str | None = None
    has_own_mlp: bool = False

    @classmethod
    def between(cls, saved: Mapping[str, Any], present: Mapping[str, Any]) -> DepthChange:
        """Compares the sections `model` of two configs, as plain data."""
        old, new = _depths(saved), _depths(present)
        return cls(
            distinct_layers(old, bool(saved.get("mtp_use_repeated_layer"))),
            distinct_layers(new, bool(present.get("mtp_use_repeated_layer"))),
            old,
            new,
            present.get("mtp_new_layers_init"),
            present.get("mtp_layer_mlp") is not None,
        )

    @property
    def has_new(self) -> bool:
        """Whether the run has layers that the checkpoint lacks."""
        return self.new > self.old

    def is_new(self, key: str) -> bool:
        """Whether a key, of a weight or of an optimizer's state, is of a layer that the checkpoint lacks."""
        return self.old <= _layer(key) < self.new

    def is_dropped(self, key: str) -> bool:
        """Whether a key is of a layer of the checkpoint that the run does not have."""
        return self.new <= _layer(key) < self.old

    def source_of(self, key: str) -> str:
        """The key of the same tensor in the checkpoint's last MTP layer."""
        return key.replace(f"mtp.layers.{_layer(key)}.", f"mtp.layers.{self.old - 1}.", 1)

    def leaves_open(self, name: str) -> bool:
        """Whether a field of the model that describes MTP layers has no meaning in one of the two."""
        return name in _OF_LAYERS and 0 in (self.old, self.new)

    def refusals(self) -> list[str]:
        """Why the layers cannot be added, one sentence each."""
        if not self.has_new:
            return []
        present = f"model.mtp_num_layers = {self.new_depths}: the checkpoint holds {_count(self.old)}"
        if self.init is None:
            ways = ", ".join(("fresh", "last_layer", *(("last_depth",) if self.old else ())))
            return [f"{present}. Say how the others are initialised: model.mtp_new_layers_init = {ways}."]
        if self.init == "last_depth" and not self.old:
            return [f"{present}, so model.mtp_new_layers_init = last_depth has no source. Use last_layer or fresh."]
        return []

    def lines(self) -> list[str]:
        """What happens to each depth that is added or dropped, for the log."""
        found = []
        for layer in range(self.old, self.new):
            how = _HOW[self.init or "fresh"].format(source=self.old, mlp=", feed-forward block" * self.has_own_mlp)
            found.append(f"depth {layer + 1} is new: {how}; the moments of its optimizer state are zero")
        for depth in range(max(self.new, self.old_depths) + 1, self.new_depths + 1):
            found.append(f"depth {depth} is new: it repeats the layer of depth 1")
        for layer in range(self.new, self.old):
            found.append(f"the layer of depth {layer + 1} is dropped, with its optimizer state")
        return found


def _count(layers: int) -> str:
    return f"{layers or 'no'} MTP layer{'s' * (layers != 1)}"


def _depths(model: Mapping[str, Any]) -> int:
    value = model.get("mtp_num_layers")
    return value if isinstance(value, int) else 0


def _layer(key: str) -> int:
    """Number of the MTP layer that a key is of; -1: of none."""
    found = _LAYER.match(key)
    return int(found[1]) if found else -1
