"""Weights & Biases. wandb is imported only if a run asks for it: the import takes about a second."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from megatron_mtp.config.sections import LoggerConfig
from megatron_mtp.errors import ConfigError
from megatron_mtp.observe.jsonl import NO_FIELDS
from megatron_mtp.observe.metrics import evaluation_tag

ALERTS = {"fault": "ERROR", "warning": "WARN", "recovery": "INFO"}
"""Kinds of text that are also sent as alerts -> W&B's level."""


class WandbSink:
    """Logs to one W&B run. A resumed training continues under the same run id.

    Every metric is plotted over the metric `iteration`: W&B's own step counter only grows and would silently drop the
    iterations that a resumed run repeats.

    Args:
        logger: project, name, group, tags and so on. The variable WANDB_MODE overrides `wandb_mode = "online"`.
        folder: where W&B keeps its local files.
        config: the resolved config of the run.
        run_id: id of the run to continue; None: a new run.

    Raises:
        ConfigError: W&B is not installed, or refuses the run (no key, no network, no such entity).
    """

    def __init__(self, logger: LoggerConfig, folder: Path, config: dict[str, Any], run_id: str | None):
        mode: str = logger.wandb_mode
        if mode == "online" and (wanted := os.environ.get("WANDB_MODE")) in ("offline", "disabled"):
            mode = wanted
        wandb = _import_wandb(mode)
        self._html = wandb.Html
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if mode == "online":
                _refuse_to_prompt(wandb)
            self._run = wandb.init(
                project=logger.wandb_project,
                name=logger.wandb_exp_name,
                entity=logger.wandb_entity,
                group=logger.wandb_group,
                tags=tuple(logger.wandb_tags),
                notes=logger.wandb_notes,
                dir=str(folder),
                mode=mode,
                config=config,
                id=run_id,
                resume="allow",
                # Everything is logged anyway, and capturing the console breaks the progress bar.
                settings=wandb.Settings(console="off", silent=mode != "online"),
            )
        except Exception as error:
            raise ConfigError(
                f"logger.wandb_project = {logger.wandb_project!r}: Weights & Biases refused the run: {error} "
                "Run `wandb login`, or set logger.wandb_mode = offline and upload the files later with `wandb sync`."
            ) from error
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    @property
    def run_id(self) -> str:
        """The id under which a resumed training continues."""
        return self._run.id

    @property
    def place(self) -> str:
        """The run's address, or its local folder when offline."""
        return self._run.url or str(Path(self._run.dir).parent)

    def step(self, iteration: int, metrics: dict[str, float]) -> None:
        """Logs the metrics of one step."""
        self._run.log({**metrics, "iteration": iteration})

    def evaluation(self, name: str, iteration: int, metrics: dict[str, float]) -> None:
        """Logs one evaluation, each metric under its `evaluation_tag`."""
        self.step(iteration, {evaluation_tag(name, metric): value for metric, value in metrics.items()})

    def message(self, kind: str, iteration: int, text: str, fields: Mapping[str, Any] = NO_FIELDS) -> None:
        """Logs a line as `text/KIND`, or a table, in fixed width.

        Faults, and signs of bad health that begin or end, are alerts too, one with the same title in a minute.
        """
        shown = self._html(f"<pre>{escape(text)}</pre>") if "\n" in text else text
        self._run.log({f"text/{kind}": shown, "iteration": iteration})
        if kind in ALERTS:
            title = f"megatron-mtp: {kind}" + (f", {fields['sign']}" if "sign" in fields else "")
            self._run.alert(title=title, text=text, level=ALERTS[kind])

    def close(self) -> None:
        """Waits until W&B has received everything."""
        self._run.finish()


def _import_wandb(mode: str) -> Any:
    if mode != "online":
        # Even offline, W&B reports its own errors over the network unless this is set before the import.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"logger.wandb_project is set, but importing wandb failed: {error}. Install it (`uv pip install wandb`) or "
            "set logger.wandb_project = null."
        ) from error
    return wandb


def _refuse_to_prompt(wandb: Any) -> None:
    """Refuses a missing key: wandb would ask for one on the terminal while the other ranks wait until they time out."""
    if "prompt" in inspect.signature(wandb.login).parameters and not wandb.login(prompt=False):
        raise ConfigError("no API key is configured.")
