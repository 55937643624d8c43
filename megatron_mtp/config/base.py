"""The base of every config section: keyword-only, slotted, mutable until frozen, and strict about names."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import Any, ClassVar, Self

from megatron_mtp.config.frozen import frozen, refuse_change
from megatron_mtp.config.knob import PhaseRule, Resume, per_class
from megatron_mtp.errors import ConfigError, cut, nearest

# Fields that are gone, with the reason. A config file may still name them; they are ignored.
REMOVED = {"logger.log_params_norm": "no norm of the weights was ever logged"}
# Names people bring from other systems, with what to do here instead.
RENAMED = {
    "pipeline_model_parallel_split_rank": "Use model.pipeline_model_parallel_layout (which layers each stage holds).",
    "num_layers_in_first_pipeline_stage": "Use model.pipeline_model_parallel_layout, for example [5, 6, 6, 4].",
    "num_layers_in_last_pipeline_stage": "Use model.pipeline_model_parallel_layout, for example [5, 6, 6, 4].",
    "account_for_embedding_in_pipeline_split": "Use model.pipeline_model_parallel_layout.",
    "account_for_loss_in_pipeline_split": "Use model.pipeline_model_parallel_layout.",
    "transformer_impl": "Use model.backend.",
    "add_cross_attention": "Leave it out: cross attention is not supported, and MTP has no form for it.",
    "cross_attention": "Leave it out: cross attention is not supported, and MTP has no form for it.",
    "mixed_precision": "Use precision.dtype.",
    "pipeline_dtype": "Use precision.dtype.",
    "params_dtype": "Use precision.dtype.",
    "bf16": "Use precision.dtype.",
    "fp16": "Use precision.dtype.",
    "fp8": "Write model.mcore.fp8 (Transformer Engine only).",
    "fp4": "Write model.mcore.fp4 (Transformer Engine only).",
    "calculate_per_token_loss": "Leave it out: every loss is divided by its global number of targets.",
    "cross_entropy_loss_fusion": "Use model.logits_chunk_tokens.",
    "cross_entropy_fusion_impl": "Use model.logits_chunk_tokens.",
    "num_nextn_predict_layers": "Use model.mtp_num_layers.",
}


@per_class
def _names(section: type) -> dict[str, None]:
    """Field names in order; a dict because every assignment looks one up."""
    return dict.fromkeys(f.name for f in fields(section))


def unknown_field(section: str, name: str, known: list[str]) -> str:
    """Says that `section` has no field `name`, and which one was probably meant."""
    if name in RENAMED:
        hint = f" {RENAMED[name]}"
    elif f"{section}.{name}" in REMOVED:
        hint = f" It was removed: {REMOVED[f'{section}.{name}']}."
    elif section == "model" and _is_megatron_core_field(name):
        hint = f" Megatron-Core has this field: write model.mcore.{name}."
    else:
        hint = nearest(name, known, prefix=f"{section}.")
    return f"{section}.{cut(name)}: there is no such field.{hint}"


def _is_megatron_core_field(name: str) -> bool:
    from megatron_mtp.config.mcore_table import MCORE_FIELDS  # only needed for a mistake

    return name in MCORE_FIELDS


class Section:
    """A group of config fields.

    Subclasses are `@dataclass(kw_only=True, slots=True)` and name themselves in `SECTION`. An unknown name raises
    ConfigError with the nearest field; after `freeze` every assignment does, also into a list or dict.
    """

    __slots__ = ("_frozen",)
    SECTION: ClassVar[str]
    RESUME: ClassVar[Resume] = "fixed"
    """What a resume may do with fields that do not say it themselves."""
    PHASE: ClassVar[PhaseRule] = "fixed"
    """What a phase may do with fields that do not say it themselves."""

    def __setattr__(self, name: str, value: Any) -> None:
        known = _names(type(self))
        if name not in known:
            raise ConfigError(unknown_field(self.SECTION, name, list(known)))
        if getattr(self, "_frozen", False):
            refuse_change(f"{self.SECTION}.{name}", value)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(unknown_field(self.SECTION, name, list(_names(type(self)))))

    def freeze(self) -> None:
        """From now on every change raises ConfigError, in the sections below and in lists and dicts too."""
        for name in _names(type(self)):
            value = getattr(self, name)
            if isinstance(value, Section):
                value.freeze()
            else:
                object.__setattr__(self, name, frozen(value, f"{self.SECTION}.{name}"))
        object.__setattr__(self, "_frozen", True)

    @property
    def is_frozen(self) -> bool:
        """Whether `freeze` was called."""
        return getattr(self, "_frozen", False)

    def update(self, **values: Any) -> None:
        """Assigns several fields: `cfg.model.update(num_layers=32, hidden_size=4096)`."""
        for name, value in values.items():
            setattr(self, name, value)

    def copy(self) -> Self:
        """A deep copy that can be changed."""
        values = {name: getattr(self, name) for name in _names(type(self))}
        return type(self)(**{name: v.copy() if isinstance(v, Section) else deepcopy(v) for name, v in values.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        # The default protocol would set slots one by one through __setattr__, which refuses `_frozen`.
        values = {name: getattr(self, name) for name in _names(type(self))}
        return _rebuild, (type(self), values, self.is_frozen)


def _rebuild(section: type[Section], values: dict[str, Any], is_frozen: bool) -> Section:
    rebuilt = section(**values)
    if is_frozen:
        rebuilt.freeze()
    return rebuilt
