"""How far a run is, and in which phase it goes on: known from its newest checkpoint before anything is built.

Imports neither torch nor megatron.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mtp.checkpoint.directory import resume_candidates
from megatron_mtp.checkpoint.train_state import TrainState, read_train_state
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.timeline import Position, Timeline
from megatron_mtp.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Args:
        begun: name and place of each phase that has begun, in order.
        has_open_evaluation: the evaluation at this place is still to be done, in the phase that has begun last.
    """

    position: Position = field(default_factory=Position)
    begun: tuple[tuple[str, Position], ...] = ()
    has_open_evaluation: bool = False

    @classmethod
    def of(cls, state: TrainState) -> Progress:
        """The progress of a run with this state."""
        return cls(state.position, tuple(state.begun), state.has_open_evaluation)


def read_progress(load: str | None) -> Progress:
    """The progress of the newest checkpoint of a run; that of a fresh start where there is none.

    Args:
        load: as checkpoint.load.

    Raises:
        CheckpointError: its train state is damaged, or of a newer version.
    """
    if load is None:
        return Progress()
    directory, iterations = resume_candidates(load)
    manifest, _ = directory.newest_listed(iterations)
    if manifest is None:
        return Progress()
    values, _ = read_train_state(directory.final_path(manifest.iteration), manifest)
    return Progress.of(TrainState.from_dict(values))


def find_phase(cfg: ConfigContainer, progress: Progress) -> tuple[Timeline[ConfigContainer], int]:
    """The timeline of a run and the index of the phase in which it goes on, which may begin here.

    Args:
        cfg: finalized, with all phases.

    Raises:
        CheckpointError: the config lacks a phase that has begun, or has them in another order.
    """
    names = [name for name, _ in progress.begun]
    if names != [name for name in cfg.phases if name in names]:
        has = f"has {', '.join(cfg.phases)}" if cfg.phases else "has none"
        raise CheckpointError(
            f"phases: the checkpoint of iteration {progress.position.iteration} has gone through {', '.join(names)}, "
            f"in this order, and the config {has}. Give the run the phases that it has begun; later ones may change."
        )
    timeline = Timeline.of(cfg, progress.begun)
    index = timeline.present(progress.position, names, may_begin=not progress.has_open_evaluation)
    name = timeline.phases[index].name
    if index == 0 or name in names:
        return timeline, index
    timeline = Timeline.of(cfg, [*progress.begun, (name, progress.position)])
    return timeline, [phase.name for phase in timeline.phases].index(name)
