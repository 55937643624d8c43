"""Sends the metrics of a run to the console, progress bar, TensorBoard, W&B, metrics.jsonl and the health monitor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.sections import section_types
from megatron_mtp.config.yaml_text import dump_yaml
from megatron_mtp.errors import ConfigError
from megatron_mtp.observe.console import evaluation_line, perplexity, step_line
from megatron_mtp.observe.env import effective_environment
from megatron_mtp.observe.health import HealthMonitor, SignEvent
from megatron_mtp.observe.jsonl import JsonlSink
from megatron_mtp.observe.metrics import Interval, StepRecord, scalars
from megatron_mtp.observe.progress import ProgressBar, wanted
from megatron_mtp.observe.signs import Sign, built_in_signs, empty_agreement
from megatron_mtp.observe.tensorboard import TensorBoardSink
from megatron_mtp.observe.wandb_sink import WandbSink

# The rank that writes the records logs for all ranks.
logger = logging.LoggerAdapter(logging.getLogger(__name__), {"all_ranks": True})


@dataclass(kw_only=True, slots=True)
class RunInfo:
    """Metadata of the run for its records."""

    recipe: str = ""
    """Name of the recipe; empty if there is none."""
    iteration: int = 0
    """Training steps done before this process; above 0 if the run is resumed."""
    train_iters: int | None = None
    """Steps of the complete run, for the progress bar."""
    world_size: int = 1
    """Processes of the run."""
    device: str = "cpu"
    """Name of the device."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved config as plain data."""
    environment: dict[str, str] = field(default_factory=effective_environment)
    """Environment variables that can change results or speed."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else that readers of the log want to know, as JSON values; see `training.run_facts`."""


class Sink(Protocol):
    """A destination of records."""

    def step(self, iteration: int, metrics: dict[str, float]) -> None: ...
    def evaluation(self, name: str, iteration: int, metrics: dict[str, float]) -> None: ...
    def message(self, kind: str, iteration: int, text: str, fields: Mapping[str, Any] = ...) -> None: ...
    def close(self) -> None: ...


class Recorder:
    """Records a run. It does nothing on ranks other than the writer.

    A console line is printed every `logger.log_interval` steps and after the first and last step; the other records are
    written every `logger.tensorboard_log_interval` steps. Each covers the steps since the previous one, merged by
    `Interval`.

    Args:
        cfg: finalized config; its logger and checkpoint sections are read.
        run_info: metadata of the run.
        is_writer: whether this rank writes; true on exactly one rank.
        resume_state: `state()` of the run to resume; None: a fresh run.
        signs: warning signs that are looked for, by name; None: the built-in ones of this model. See `health`.

    Raises:
        ConfigError: a folder is not writable, or Weights & Biases is requested but not available.
    """

    def __init__(
        self,
        cfg: ConfigContainer,
        run_info: RunInfo,
        is_writer: bool,
        resume_state: dict[str, Any] | None = None,
        signs: Mapping[str, Sign] | None = None,
    ):
        self._logger = cfg.logger
        self._is_writer = is_writer
        self._state = dict(resume_state or {})
        self._sinks: list[Sink] = []
        self.places: dict[str, str] = {}
        """Kind of record (`metrics`, `tensorboard`, `wandb`) -> where it is."""
        self._bar: ProgressBar | None = None
        self._health = HealthMonitor(built_in_signs(cfg.model.mtp_num_layers or 0) if signs is None else signs)
        self._health.load_state_dict(self._state.pop("signs", {}))
        self._console_interval, self._sink_interval = Interval(), Interval()
        self._iteration = run_info.iteration
        self._is_first_step = True
        if not is_writer:
            return
        logger.info(
            "environment: %s",
            " ".join(f"{k}={v}" for k, v in run_info.environment.items()) or "no relevant variable is set",
        )
        self._open_sinks(cfg, run_info)
        if wanted(cfg.logger.progress_bar):
            self._bar = ProgressBar(run_info.iteration, run_info.train_iters, force=cfg.logger.progress_bar is True)

    def step(self, record: StepRecord) -> None:
        """Records one training step. Call it once per step."""
        if not self._is_writer:
            return
        self._iteration = record.iteration
        self._console_interval.add(record)
        self._sink_interval.add(record)
        if record.iteration % self._logger.tensorboard_log_interval == 0 or record.iteration == record.train_iters:
            metrics = scalars(self._sink_interval.drain())
            self._each(lambda sink: sink.step(record.iteration, metrics))
        if record.iteration % self._logger.log_interval == 0 or record.iteration == record.train_iters:
            self._print(step_line(self._console_interval.drain(), self._logger.log_throughput))
        elif self._is_first_step:
            # Also part of the next line. The first step includes compilation and other one-time work.
            self._print(step_line(self._console_interval.merged(), self._logger.log_throughput))
        self._is_first_step = False
        self._report(self._health.check(record.iteration, scalars(record)))
        if self._bar:
            self._bar.update(record)

    def evaluation(
        self, name: str, iteration: int, losses: dict[str, float], extra: dict[str, float] | None = None
    ) -> None:
        """Records one evaluation.

        Args:
            name: `validation`, `test`, or the name of another validation set.
            iteration: training steps done before it.
            losses: nats per token, the main loss first, as in StepRecord.
            extra: other metrics, such as acceptance rates.
        """
        if not self._is_writer:
            return
        extra = extra or {}
        self._print(evaluation_line(name, iteration, losses, extra))
        if note := empty_agreement(extra):
            self._print(f" {name}: {note}")
        metrics = {**losses, **({"lm loss ppl": perplexity(losses["lm loss"])} if "lm loss" in losses else {}), **extra}
        self._each(lambda sink: sink.evaluation(name, iteration, metrics))
        self._report(self._health.check_evaluation(name, iteration, losses))

    def message(
        self, text: str, kind: str = "message", iteration: int | None = None, *, is_repeat: bool = False
    ) -> None:
        """Prints a line or a table and writes it to every record under the given kind.

        Args:
            iteration: that the text is about; None: the one of the last step.
            is_repeat: only metrics.jsonl gets it.
        """
        if not self._is_writer:
            return
        if not is_repeat:
            self._print(text)
        send = methodcaller("message", kind, self._iteration if iteration is None else iteration, text)
        self._each(send, JsonlSink if is_repeat else object)

    def end(self, text: str) -> None:
        """Writes to metrics.jsonl how this process ended; a log without it is of a run that goes on, or was killed."""
        self.message(text, kind="end", is_repeat=True)

    def roll_back(self, iteration: int, signs: Mapping[str, Any] | None = None) -> None:
        """Marks later records as void: the run continues from an earlier iteration. They stay in metrics.jsonl.

        Args:
            signs: what `state()` held under this name at that iteration.
        """
        self._iteration = iteration
        self._health.load_state_dict(signs or {})
        self._console_interval, self._sink_interval = Interval(), Interval()
        self._each(lambda sink: sink.message("rollback", iteration, f"the run continues from iteration {iteration}"))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to continue the same records, as plain data; complete on the writer only."""
        return self._state | ({"signs": self._health.state_dict()} if self._is_writer else {})

    def close(self) -> None:
        """Removes the progress bar and closes all records; may be called twice."""
        if self._bar:
            self._bar.close()
            self._bar = None
        self._each(lambda sink: sink.close())
        self._sinks.clear()

    def _report(self, events: list[SignEvent]) -> None:
        """Prints and records the signs that begin or end."""
        for event in events:
            kind = "warning" if event.begins else "recovery"
            logger.log(logging.WARNING if event.begins else logging.INFO, event.text)
            self._each(methodcaller("message", kind, event.iteration, event.text, {"sign": event.sign}))

    def _open_sinks(self, cfg: ConfigContainer, run_info: RunInfo) -> None:
        metrics = metrics_path(cfg)
        if metrics:
            field = "logger.log_dir" if cfg.logger.log_dir else "checkpoint.save"
            with _writable(field, metrics.parent):
                self._sinks.append(JsonlSink(metrics, run_info.iteration, asdict(run_info)))
            self.places["metrics"] = str(metrics)
        if cfg.logger.tensorboard_dir:
            with _writable("logger.tensorboard_dir", cfg.logger.tensorboard_dir):
                place, text = Path(cfg.logger.tensorboard_dir), dump_yaml(run_info.config)
                self._sinks.append(TensorBoardSink(place, run_info.iteration, text, _hparams(cfg)))
            self.places["tensorboard"] = cfg.logger.tensorboard_dir
        if cfg.logger.wandb_project:
            folder = Path(cfg.logger.wandb_save_dir or (metrics.parent if metrics else "."))
            config = {"recipe": run_info.recipe, "world_size": run_info.world_size} | run_info.config
            with _writable("logger.wandb_save_dir", folder):
                wandb = WandbSink(
                    cfg.logger, folder, config | {"environment": run_info.environment}, self._state.get("wandb_run_id")
                )
            self._sinks.append(wandb)
            self._state["wandb_run_id"] = wandb.run_id
            self.places["wandb"] = wandb.place

    def _each(self, act: Callable[[Sink], None], kind: type = object) -> None:
        """Calls every sink of a kind. One that fails (full disk, lost server) is dropped with an error; training
        continues."""
        for sink in [sink for sink in self._sinks if isinstance(sink, kind)]:
            try:
                act(sink)
            except Exception:
                logger.exception("%s failed and is dropped; training continues without it.", type(sink).__name__)
                self._sinks.remove(sink)

    def _print(self, line: str) -> None:
        if self._bar:
            self._bar.print(line)
        else:
            print(line, flush=True)


def _hparams(cfg: ConfigContainer) -> dict[str, float | str]:
    """Numbers, flags and texts of the config that differ from their defaults, by "section.field"."""
    defaults, given = ConfigContainer().to_dict(), cfg.to_dict()
    return {
        f"{section}.{name}": value
        for section in section_types()
        for name, value in given[section].items()
        if value != defaults[section][name] and isinstance(value, int | float | str)
    }


@contextmanager
def _writable(field: str, folder: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{field} = {str(folder)!r}: cannot write the run's records there: {error.strerror or error}. "
            "Choose a folder on a disk that this user can write to."
        ) from error


def metrics_path(cfg: ConfigContainer) -> Path | None:
    """Path of a run's metrics.jsonl: in logger.log_dir, else next to checkpoint.save; None if neither is set."""
    if cfg.logger.log_dir:
        return Path(cfg.logger.log_dir) / "metrics.jsonl"
    if cfg.checkpoint.save:
        # Not inside it: that folder holds checkpoints only. Named after it: sibling runs must not share one file.
        save = Path(cfg.checkpoint.save)
        return save.with_name(save.name + ".metrics.jsonl")
    return None
