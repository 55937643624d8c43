"""What must survive a restart besides weights, optimizer and random numbers: one small dataclass of plain numbers.

Learning rate, weight decay and loss factor are not in it: they are functions of `consumed_samples`. So is the data
position, except for `passed_over_samples`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_mtp.errors import CheckpointError

# What each value must be when it comes out of a file; bool is an int to Python and is refused.
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str | None": (str, type(None)),
    "dict[str, list[int]]": (dict,),
    "dict[str, Any]": (dict,),
}


@dataclass(slots=True)
class TrainState:
    """Position and counters of a run. All counts are global, over every rank, since the start of the run."""

    iteration: int = 0
    """Steps done, skipped ones included."""
    consumed_samples: int = 0
    """Samples of all steps done; every schedule and the data order depend on it."""
    consumed_tokens: int = 0
    """consumed_samples * seq_length."""
    skipped_iterations: int = 0
    """Steps whose update was skipped (fp16 overflow or a policy for bad numbers)."""
    nan_iterations: int = 0
    """Steps whose loss or gradient was not finite."""
    skips_in_row: int = 0
    """Steps that a policy for bad numbers has skipped since the last good one."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint by itself."""
    passed_over_samples: int = 0
    """Samples that rollbacks skipped: the data is this far ahead of consumed_samples."""
    elapsed_s: float = 0.0
    """Wall-clock seconds of all sessions of the run, up to the last checkpoint."""
    floating_point_operations: float = 0.0
    """Model FLOPs of all steps."""
    best_validation_loss: float | None = None
    """Lowest main loss on the validation set, nats per token; None: not evaluated yet."""
    acceptance: dict[str, list[int]] = field(default_factory=dict)
    """Acceptance counters: name -> one count for each MTP depth 1..D."""
    wandb_run_id: str | None = None
    """Id of the run in Weights & Biases, which a resumed run continues."""
    health: dict[str, Any] = field(default_factory=dict)
    """What the watch for spikes remembers; JSON values only."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Name of a callback -> its `state_dict`; JSON values only."""

    @property
    def data_position(self) -> int:
        """Samples of the data order that were trained on or skipped."""
        return self.consumed_samples + self.passed_over_samples

    def advance(self, samples: int, seq_length: int) -> None:
        """Counts one step of `samples` samples."""
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += samples * seq_length

    def add_acceptance(self, counts: dict[str, list[int]]) -> None:
        """Adds the global counts of one step: name -> one count for each depth. Python integers do not overflow.

        Example: {"matches_target": [5, 2]} added to {"matches_target": [10, 4]} gives [15, 6].
        """
        for name, new in counts.items():
            old = self.acceptance.setdefault(name, [0] * len(new))
            if len(old) != len(new):
                raise ValueError(f"acceptance counter {name!r} has {len(old)} depths, but {len(new)} were added")
            self.acceptance[name] = [int(a) + int(b) for a, b in zip(old, new, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values. A copy: an asynchronous save writes it while later steps count on."""
        return {f.name: deepcopy(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of `to_dict`; see `restore` for what is accepted."""
        state = cls()
        state.restore(values)
        return state

    def restore(self, values: dict[str, Any]) -> None:
        """Takes over the values of a checkpoint, in place. A field the checkpoint lacks keeps its present value.

        Raises:
            CheckpointError: a name or type this version does not know, so that no counter is lost silently.
        """
        known = {f.name: f for f in fields(self)}
        for name, value in values.items():
            if name not in known:
                raise CheckpointError(
                    f"train state: {name} = {value!r} is unknown to this version: a newer one wrote the checkpoint. "
                    "Resume with that version."
                )
            kinds = _KINDS[str(known[name].type)]
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise CheckpointError(
                    f"train state: {name} = {value!r} should be {known[name].type}. Use another checkpoint."
                )
        for name, value in values.items():
            setattr(self, name, value)
