"""Weights & Biases. wandb is imported when a run asks for it, not before: it takes about a second."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from megatron_mtp.config.sections import LoggerConfig
from megatron_mtp.errors import ConfigError


class WandbSink:
    """Logs to one W&B run. A resumed training goes on under the same run id.

    Every figure is plotted over `iteration`, a figure of its own: W&B's step counter only grows and would silently drop the
    iterations that a resumed run does again.

    Args:
        logger: project, name, entity and mode. The environment's WANDB_MODE wins over `wandb_mode = "online"`.
        folder: where W&B keeps its local files.
        config: the resolved config of the run.
        run_id: the id of the run to go on with; None: a new one.

    Raises:
        ConfigError: W&B is not installed, or refuses the run (no key, no network, no such entity).
    """

    def __init__(self, logger: LoggerConfig, folder: Path, config: dict[str, Any], run_id: str | None):
        mode = logger.wandb_mode
        if mode == "online" and (wanted := os.environ.get("WANDB_MODE")) in ("offline", "disabled"):
            mode = wanted
        wandb = _import_wandb(mode)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if mode == "online":
                _refuse_to_prompt(wandb)
            self._run = wandb.init(
                project=logger.wandb_project,
                name=logger.wandb_exp_name,
                entity=logger.wandb_entity,
                dir=str(folder),
                mode=mode,
                config=config,
                id=run_id,
                resume="allow",
                # The console holds what is logged anyway, and capturing it breaks the progress bar.
                settings=wandb.Settings(console="off", silent=mode != "online"),
            )
        except Exception as error:
            raise ConfigError(
                f"logger.wandb_project = {logger.wandb_project!r}: Weights & Biases refused the run: {error} "
                "Run `wandb login`, or set logger.wandb_mode = offline and send the files later with `wandb sync`."
            ) from error
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    @property
    def run_id(self) -> str:
        """The id under which a resumed training goes on."""
        return self._run.id

    @property
    def place(self) -> str:
        """The run's address, or its local folder when offline."""
        return self._run.url or str(Path(self._run.dir).parent)

    def step(self, iteration: int, figures: dict[str, float]) -> None:
        """Logs the figures of one step."""
        self._run.log({**figures, "iteration": iteration})

    def evaluation(self, name: str, iteration: int, figures: dict[str, float]) -> None:
        """Logs one evaluation as `lm loss validation`, as Megatron names it."""
        self._run.log({**{f"{key} {name}": value for key, value in figures.items()}, "iteration": iteration})

    def message(self, kind: str, iteration: int, text: str) -> None:
        """Text is not kept here."""

    def close(self) -> None:
        """Waits until W&B has everything."""
        self._run.finish()


def _import_wandb(mode: str) -> Any:
    if mode != "online":
        # W&B reports its own errors over the network even in an offline run, unless told not to before it is imported.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"logger.wandb_project is set, but wandb does not import: {error}. Install it (`uv pip install wandb`), or set "
            "logger.wandb_project = null."
        ) from error
    return wandb


def _refuse_to_prompt(wandb: Any) -> None:
    """Without a key wandb asks for one on the terminal, and the other ranks wait for this one until they time out."""
    if "prompt" in inspect.signature(wandb.login).parameters and not wandb.login(prompt=False):
        raise ConfigError("no API key is configured.")
