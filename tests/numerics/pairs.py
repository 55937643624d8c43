"""Which two features work together: the table in docs/numerics.md, made from the config checks.

python -m tests.numerics.pairs rewrites the table. tests/numerics/test_pairs.py compares it, and checks a step of each
pair that the table calls exact against one rank.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.checks.parallel import minimum_world_size
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.errors import ConfigError
from megatron_mtp.recipes import get_recipe
from scripts.markdown import formatted
from tests.harness.models import SMALL

DOCUMENT = Path(__file__).parents[2] / "docs" / "numerics.md"
BEGIN, END = "<!-- pairs: begin -->", "<!-- pairs: end -->"
LARGEST_WORLD = 8
BASE = (*SMALL, "train.micro_batch_size=1", "train.global_batch_size=4")


@dataclass(frozen=True)
class Feature:
    """Fields that switch something on. A layout or a way to save memory must not change a number; the others do.

    Args:
        is_exact: one rank with the other features alone gives the same numbers.
        recipe: None: dense unless the other feature says otherwise.
    """

    fields: tuple[str, ...] = ()
    is_exact: bool = False
    recipe: str | None = None


def _recompute(*fields: str) -> Feature:
    return Feature(tuple(f"model.recompute_{field}" for field in fields), is_exact=True)


FEATURES = {
    "TP": Feature(("model.tensor_model_parallel_size=2", "model.sequence_parallel=false"), is_exact=True),
    "TP+SP": Feature(("model.tensor_model_parallel_size=2", "model.sequence_parallel=true"), is_exact=True),
    "PP": Feature(("model.pipeline_model_parallel_size=2",), is_exact=True),
    "VPP": Feature(
        ("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"), is_exact=True
    ),
    "m\\|L": Feature(
        ("model.pipeline_model_parallel_size=3", "model.pipeline_model_parallel_layout=Etttt|mm|L"), is_exact=True
    ),
    "CP": Feature(("model.context_parallel_size=2",), is_exact=True),
    "EP": Feature(
        ("model.expert_model_parallel_size=2", "model.expert_tensor_parallel_size=1"),
        is_exact=True,
        recipe="tiny_mla_moe",
    ),
    "distributed optimizer": Feature(("ddp.use_distributed_optimizer=true",), is_exact=True),
    "recompute uniform": _recompute("granularity=full", "method=uniform", "num_layers=1"),
    "recompute block": _recompute("granularity=full", "method=block", "num_layers=1"),
    "recompute selective": _recompute("granularity=selective", "modules=[core_attn, layernorm, mlp]"),
    "MoE+MLA": Feature(recipe="tiny_mla_moe"),
    "router z-loss": Feature(("model.moe_z_loss_coeff=0.01",), recipe="tiny_mla_moe"),
    "tied head": Feature(("model.share_embeddings_and_output_weights=true",)),
    "documents": Feature(("dataset.reset_attention_mask=true",)),
    "repeated layer": Feature(("model.mtp_use_repeated_layer=true",)),
    "parallel heads": Feature(("model.mtp_variant=parallel",)),
    "detached": Feature(("model.mtp_detach_heads=true",)),
    "frozen trunk": Feature(("model.mtp_freeze_trunk=true",)),
    "pre-norm": Feature(("model.mtp_hidden_source=pre_final_norm",)),
    "TE": Feature(("model.backend=transformer_engine",)),
    "learned positions": Feature(("model.position_embedding_type=learned_absolute",)),
}


@dataclass(frozen=True)
class Pair:
    """Two features in one config."""

    left: str
    right: str

    @property
    def is_contradiction(self) -> bool:
        """Both set one field, to different values: there is no such pair."""
        values: dict[str, str] = {}
        for text in self.fields:
            name, value = text.split("=", 1)
            if values.setdefault(name, value) != value:
                return True
        return False

    @property
    def fields(self) -> tuple[str, ...]:
        return FEATURES[self.left].fields + FEATURES[self.right].fields

    @property
    def recipe(self) -> str:
        return FEATURES[self.left].recipe or FEATURES[self.right].recipe or "tiny_dense"

    @property
    def reference_fields(self) -> tuple[str, ...]:
        """Without what must not change a number."""
        features = (FEATURES[self.left], FEATURES[self.right])
        return tuple(field for feature in features if not feature.is_exact for field in feature.fields)

    def config(self) -> ConfigContainer:
        cfg = get_recipe(self.recipe)
        apply_overrides(cfg, [*BASE, *self.fields])
        return cfg

    @property
    def world_size(self) -> int:
        """The smallest, and twice that for the distributed optimizer."""
        cfg = self.config()
        is_sharded = "distributed optimizer" in (self.left, self.right)
        if cfg.model.expert_tensor_parallel_size is None:
            cfg.model.expert_tensor_parallel_size = cfg.model.tensor_model_parallel_size
        return minimum_world_size(cfg.model) * (2 if is_sharded else 1)

    def refusal(self) -> str | None:
        """The message of the checks, or None."""
        try:
            self.config().finalize(self.world_size)
        except ConfigError as error:
            return str(error)
        return None

    @property
    def is_run(self) -> bool:
        """Whether test_pairs takes a step of it."""
        names = (self.left, self.right)
        return not self.is_contradiction and "TE" not in names and self.world_size <= LARGEST_WORLD


def all_pairs() -> list[Pair]:
    return [Pair(left, right) for left, right in itertools.combinations(FEATURES, 2)]


def table() -> str:
    """The table and its notes, in Markdown."""
    notes: list[str] = []
    cells = {(pair.left, pair.right): _cell(pair, notes) for pair in all_pairs()}
    lines = ["| | " + " | ".join(FEATURES) + " |", "|---" * (len(FEATURES) + 1) + "|"]
    for left in FEATURES:
        row = [cells.get((left, right)) or cells.get((right, left)) or "" for right in FEATURES]
        lines.append(f"| **{left}** | " + " | ".join(row) + " |")
    messages = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    text = "\n".join([*lines, "", "What the numbers stand for, as the program says it:", "", *messages])
    return formatted(text).strip()


def _cell(pair: Pair, notes: list[str]) -> str:
    if pair.is_contradiction:
        return "-"
    message = pair.refusal()
    if message is None:
        return "exact" if pair.is_run else "allowed"
    if message not in notes:
        notes.append(message)
    return str(notes.index(message) + 1)


def write() -> None:
    """Puts the table between its marks."""
    text = DOCUMENT.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    DOCUMENT.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}")


if __name__ == "__main__":
    write()
