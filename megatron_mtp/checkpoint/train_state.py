"""What must survive a restart besides weights, optimizer and random numbers: one small dataclass of plain numbers.

Learning rate, weight decay and loss factor are not in it: they are functions of the position and of where the phases
have begun. So is the data position, except for `passed_over_samples`.
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megatron_mtp.checkpoint.manifest import TRAIN_STATE_NAME, Manifest, is_count
from megatron_mtp.config.timeline import Position
from megatron_mtp.errors import CheckpointError
from megatron_mtp.storage.place import Place


def _is_number(value: Any) -> bool:
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and abs(value) <= sys.float_info.max  # neither nan nor inf, which JSON can hold, nor more


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(c, list) and all(map(is_count, c)) for c in value.values())


def _are_phases(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(phase, dict)
        and set(phase) == {"name", "changes", *_PLACE}
        and isinstance(phase["name"], str)
        and isinstance(phase["changes"], dict)
        and all(is_count(phase[key]) for key in _PLACE)
        for phase in value
    )


_PLACE = tuple(one.name for one in fields(Position))
# What each value must be when it comes out of a file.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "int": is_count,
    "bool": lambda value: isinstance(value, bool),
    "float": lambda value: _is_number(value) and value >= 0,
    "float | None": lambda value: value is None or _is_number(value),
    "str | None": lambda value: isinstance(value, str | None),
    "dict[str, list[int]]": _are_counts,
    "dict[str, Any]": lambda value: isinstance(value, dict),
    "list[dict[str, Any]]": _are_phases,
}
_WORDS = {"int": "int of at least 0", "float": "float of at least 0", "dict[str, list[int]]": "lists of counts"}
_WORDS["list[dict[str, Any]]"] = "phases, each with name, iteration, samples, tokens, data and changes"
_REQUIRED = ("iteration", "consumed_samples", "consumed_tokens")
"""Every release saved them. Other fields came later, and a checkpoint may lack them."""


@dataclass(slots=True)
class TrainState:
    """Position and counters of a run. All counts are global, over every rank, since the start of the run."""

    iteration: int = 0
    """Steps done, skipped ones included."""
    consumed_samples: int = 0
    """Samples of all steps done; every schedule and the data order depend on it."""
    consumed_tokens: int = 0
    """Sum over all phases of samples * seq_length."""
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
    """Wall-clock seconds of all steps, without evaluations and saves."""
    floating_point_operations: float = 0.0
    """Model FLOPs of all steps."""
    best_validation_loss: float | None = None
    """Lowest validation loss that checkpoint.best_metric names, nats per token; None: not evaluated yet."""
    best_metric: str | None = None
    """checkpoint.best_metric when that was found."""
    phases: list[dict[str, Any]] = field(default_factory=list)
    """History of `cfg.phases`: each phase that has begun, with its place (see `config.timeline.Position`) and changes,
    "section.field" -> [value before, value in it]."""
    has_open_evaluation: bool = False
    """The evaluation after this iteration was not over when this was saved: a signal came. A resume repeats it."""
    acceptance: dict[str, list[int]] = field(default_factory=dict)
    """Acceptance counters: name -> one count for each MTP depth 1..D."""
    wandb_run_id: str | None = None
    """Id of the run in Weights & Biases, which a resumed run continues."""
    health: dict[str, Any] = field(default_factory=dict)
    """What the watch for spikes and, on the rank that writes the records, the warning signs remember; JSON values."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Name of a callback -> its `state_dict`; JSON values only."""

    @property
    def data_position(self) -> int:
        """Samples of the data order that were trained on or skipped."""
        return self.consumed_samples + self.passed_over_samples

    @property
    def position(self) -> Position:
        """How far the run is."""
        return Position(self.iteration, self.consumed_samples, self.consumed_tokens, self.data_position)

    @property
    def begun(self) -> list[tuple[str, Position]]:
        """Name and place of each phase that has begun, in order."""
        return [(phase["name"], Position(**{key: phase[key] for key in _PLACE})) for phase in self.phases]

    def begin_phase(self, name: str, changes: dict[str, list[Any]]) -> None:
        """Adds a phase that begins here to the history. What losses and gradients were before it says nothing of them
        in it: the watch for spikes starts again."""
        self.phases.append({"name": name, "changes": changes, **asdict(self.position)})
        self.health.pop("spikes", None)

    def advance(self, samples: int, seq_length: int) -> None:
        """Counts one step of `samples` samples."""
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += samples * seq_length

    def add_acceptance(self, counts: dict[str, list[int]]) -> None:
        """Adds the global counts of one step: name -> one count for each depth. Python integers do not overflow.

        Example: {"label_hits": [5, 2]} added to {"label_hits": [10, 4]} gives [15, 6].
        """
        for name, new in counts.items():
            old = self.acceptance.setdefault(name, [0] * len(new))
            if len(old) != len(new):
                raise ValueError(f"acceptance counter {name!r} has {len(old)} depths, but {len(new)} were added")
            self.acceptance[name] = [int(a) + int(b) for a, b in zip(old, new, strict=True)]

    def keep_depths(self, num_depths: int) -> None:
        """Acceptance counters of depths that are new start at zero; those of dropped depths are dropped.

        Example: {"label_hits": [15, 6]} with three depths is {"label_hits": [15, 6, 0]}.
        """
        for name, counts in self.acceptance.items():
            self.acceptance[name] = (counts + [0] * num_depths)[:num_depths]

    def accepted_over_run(self) -> list[float]:
        """`mtp_k/accepted` of each depth 1..D over all steps of the run so far; 0 where no slot counts."""
        counts = zip(self.acceptance.get("chain_hits", []), self.acceptance.get("chain_valid", []), strict=False)
        return [hits / (valid or 1) for hits, valid in counts]

    def totals(self) -> str:
        """Counters of all sessions of the run, for the log."""
        texts = [
            f"{self.iteration} iterations",
            f"{self.consumed_tokens} tokens",
            f"{_duration(self.elapsed_s)} in steps",
            f"{self.floating_point_operations:.3g} FLOPs of the model",
        ]
        texts += [f"mtp_{k} accepted {100 * share:.1f} %" for k, share in enumerate(self.accepted_over_run(), 1)]
        return ", ".join(texts)

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
            CheckpointError: a name this version does not know, so that no counter is lost silently, or a wrong value.
        """
        for name, value in values.items():
            if name not in _TYPES:
                raise CheckpointError(
                    f"train state: {name} = {value!r} is unknown to this version: a newer one wrote the checkpoint. "
                    "Resume with that version."
                )
            if problem := _problem(name, value):
                raise CheckpointError(f"train state: {problem}. Use another checkpoint.")
        for name, value in values.items():
            setattr(self, name, value)


def _duration(seconds: float) -> str:
    """In the unit that a person would choose: seconds up to two minutes, minutes up to two hours, then hours."""
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 120 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 3600:.1f} h"


_TYPES = {f.name: str(f.type) for f in fields(TrainState)}


def _problem(name: str, value: Any) -> str | None:
    """What is wrong with the value of a field; None: it can be taken over."""
    kind = _TYPES[name]
    return None if _CHECKS[kind](value) else f"{name} = {reprlib.repr(value)} should be {_WORDS.get(kind, kind)}"


def read_train_state(folder: Place, manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The train state of a checkpoint, for `TrainState.restore`, and its optimizer's scalars.

    An attacker, or who edits it by hand, writes a new checksum too, so the values must make sense.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / TRAIN_STATE_NAME
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        train, optimizer = _checked(saved, manifest)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: is damaged (it is nested too deeply).") from error
    except ValueError as error:  # not UTF-8 and not JSON are ValueErrors too
        raise CheckpointError(f"{path}: is damaged ({error}).") from error
    return train, optimizer


def _checked(saved: Any, manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both parts. Names that this version does not know are left to `TrainState.restore`, which refuses them.

    Raises:
        ValueError: a part is missing, or a value cannot be.
    """
    if not isinstance(saved, dict) or not all(isinstance(saved.get(part), dict) for part in ("train", "optimizer")):
        raise ValueError("it does not hold the parts train and optimizer")
    train, optimizer = saved["train"], saved["optimizer"]
    if missing := [name for name in _REQUIRED if name not in train]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for name in [name for name in _TYPES if name in train]:
        if problem := _problem(name, train[name]):
            raise ValueError(problem)
    for name in ("iteration", "consumed_samples"):
        if train[name] != getattr(manifest, name):
            raise ValueError(f"{name} = {train[name]}, but the manifest says {getattr(manifest, name)}")
    step, scale = optimizer.get("step", ""), optimizer.get("grad_scaler", "")
    if not (step is None or is_count(step)):
        raise ValueError(f"the optimizer's step = {reprlib.repr(step)} should be a count or null")
    if not (scale is None or (isinstance(scale, dict) and all(map(_is_number, scale.values())))):
        raise ValueError(f"grad_scaler = {reprlib.repr(scale)} should be numbers by name or null")
    return train, optimizer
