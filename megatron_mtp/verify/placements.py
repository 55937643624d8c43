"""Layouts as text: "tp=2,sp=1; pp=2,vp=2; pp=4,layout=Ett|tt|mm|L; dp=2,distopt=1; mbs=1; pp=2,recompute=block"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.checks.parallel import minimum_world_size
from megatron_mtp.config.quantity import read_number
from megatron_mtp.errors import ConfigError, Problem, cut, nearest, shown

# Key of a layout's text -> field of the config.
FIELDS = {
    "tp": "model.tensor_model_parallel_size",
    "sp": "model.sequence_parallel",
    "pp": "model.pipeline_model_parallel_size",
    "vp": "model.virtual_pipeline_model_parallel_size",
    "layout": "model.pipeline_model_parallel_layout",
    "cp": "model.context_parallel_size",
    "ep": "model.expert_model_parallel_size",
    "etp": "model.expert_tensor_parallel_size",
    "distopt": "ddp.use_distributed_optimizer",
    "overlap": "ddp.overlap_grad_reduce",
    "mbs": "train.micro_batch_size",
}
KEYS = (*FIELDS, "dp", "recompute")
SWITCHES = ("sp", "distopt", "overlap")
RECOMPUTE: dict[str, dict[str, Any]] = {
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective"},
}
# The values of one rank, which a layout changes; 1 where none stands here.
ONE_RANK: dict[str, Any] = {"sp": False, "vp": None, "layout": "auto", "etp": None, "distopt": False, "overlap": False}


@dataclass(frozen=True, slots=True)
class Placement:
    """A layout of `--layouts`: how to place a run on ranks.

    Attributes:
        text: as the user wrote it.
        values: key of KEYS -> value. A missing key has its value on one rank; a missing etp is tp.
    """

    text: str
    values: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Placement:
        """Reads "key=value,key=value"; the empty text is one rank.

        Raises:
            ConfigError: an unknown key or a value that does not fit it.
        """
        values: dict[str, Any] = {}
        for pair in filter(None, (part.strip() for part in text.split(","))):
            key, _, value = (part.strip() for part in pair.partition("="))
            if key not in KEYS:
                meant = f"{nearest(key, KEYS)} Known: {', '.join(KEYS)}."
                raise ConfigError(f"--layouts: {shown(key)} in {shown(text.strip())} is unknown.{meant}")
            if key in values:
                raise ConfigError(f"--layouts: {key} occurs twice in {shown(text.strip())}. Name each key once.")
            values[key] = _value(key, value, text)
        return cls(text.strip() or "one rank", values)

    def apply(self, cfg: ConfigContainer) -> ConfigContainer:
        """A copy of the one-rank `cfg`, finalized for this layout.

        Raises:
            ConfigError: the layout is invalid for this model; its text stands before each reason.
        """
        placed = self.place(cfg)
        try:
            return placed.finalize(self.world_size(placed))
        except ConfigError as error:
            raise error.within(f"--layouts, {self.text}") from error

    def place(self, cfg: ConfigContainer) -> ConfigContainer:
        """A copy of `cfg` with this layout's sizes, not finalized; missing keys have their one-rank values."""
        placed = cfg.copy()
        for key, name in FIELDS.items():
            if key == "mbs" and key not in self.values:
                continue
            section, field = name.split(".")
            setattr(getattr(placed, section), field, self.values.get(key, ONE_RANK.get(key, 1)))
        placed.ddp.overlap_param_gather = placed.ddp.overlap_grad_reduce and placed.ddp.use_distributed_optimizer
        for name, value in RECOMPUTE.get(str(self.values.get("recompute", "")), {}).items():
            setattr(placed.model, name, value)
        return placed

    def world_size(self, placed: ConfigContainer) -> int:
        """Number of ranks: the smallest that the sizes allow, or tp * cp * pp * dp where dp is given."""
        model = placed.model
        if "dp" not in self.values:
            return minimum_world_size(model)
        dense = model.tensor_model_parallel_size * model.context_parallel_size * model.pipeline_model_parallel_size
        return dense * self.values["dp"]


def parse_layouts(text: str) -> list[Placement]:
    """Reads layouts separated by semicolons.

    Raises:
        ConfigError: names every layout that cannot be parsed, or says that there is none.
    """
    layouts: list[Placement] = []
    problems: list[Problem] = []
    for part in filter(str.strip, text.split(";")):
        try:
            layouts.append(Placement.parse(part))
        except ConfigError as error:
            problems += error.problems
    if not layouts and not problems:
        raise ConfigError('--layouts: is empty. Write for example --layouts "tp=2; pp=2".')
    if problems:
        raise ConfigError(problems)
    return layouts


def _value(key: str, value: str, text: str) -> Any:
    where = f"--layouts: {key}={cut(value)} in {shown(text.strip())}"
    if key == "layout":
        return value or "auto"
    if key == "recompute":
        if value not in RECOMPUTE:
            raise ConfigError(f"{where}: must be one of {', '.join(RECOMPUTE)}.")
        return value
    if key in SWITCHES:
        if value not in ("0", "1"):
            raise ConfigError(f"{where}: must be 0 or 1.")
        return value == "1"
    try:
        number = read_number(value, int)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"{where}: must be an integer of at least 1.")
    return number
