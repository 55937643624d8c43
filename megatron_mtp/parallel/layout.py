"""Where every layer sits in the pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_mtp.config.depths import Depths
from megatron_mtp.config.layout_text import layout_chunks
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.errors import PlanError

Chunk = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PipelineLayout:
    """The symbols of every chunk, in execution order: `E` embedding, `t` decoder layer, `m` MTP layer, `L` loss.

    Args:
        chunks: `chunks[pp_rank][vp_rank]` is a tuple of symbols.

    Example: 4 layers and 2 depths at pp=2 -> chunks == ((("E", "t", "t", "t"),), (("t", "m", "m", "L"),)).
    """

    chunks: tuple[tuple[Chunk, ...], ...]

    @classmethod
    def of(cls, model: ModelConfig) -> PipelineLayout:
        """The layout that a config gives; "auto" is for the planner, see `parallel.resolve`.

        Raises:
            PlanError: the layout breaks a rule; all problems are named.
        """
        layout: str | list[int] = model.pipeline_model_parallel_layout
        assert model.pipeline_model_parallel_size == 1 or layout != "auto", "the planner chooses it"
        return cls.parse(layout, model)

    @classmethod
    def parse(cls, layout: str | list[int], model: ModelConfig) -> PipelineLayout:
        """A layout of a finalized model: "even", Megatron's string, or the decoder layers of each chunk.

        Raises:
            PlanError: the layout breaks a rule; all problems are named.
        """
        pp, vp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
        depths = Depths.of(model).count
        flat, problems = layout_chunks(layout, num_layers=model.num_layers, num_depths=depths, pp=pp, vp=vp)
        if problems:
            raise PlanError(problems)
        return cls.of_chunks(flat, pp, vp)

    @classmethod
    def of_chunks(cls, flat: Sequence[Iterable[str]], pp: int, vp: int) -> PipelineLayout:
        """From pp * vp chunks in execution order."""
        return cls(tuple(tuple(tuple(flat[v * pp + p]) for v in range(vp)) for p in range(pp)))

    @property
    def pp(self) -> int:
        """Pipeline size."""
        return len(self.chunks)

    @property
    def vp(self) -> int:
        """Virtual pipeline size; 1 without interleaving."""
        return len(self.chunks[0])

    @property
    def megatron_vp(self) -> int | None:
        """Megatron-Core's virtual pipeline size: None without interleaving."""
        return self.vp if self.vp > 1 else None

    @property
    def in_order(self) -> list[Chunk]:
        """All chunks in execution order, which is Megatron's order in its layout string."""
        return [self.chunks[p][v] for v in range(self.vp) for p in range(self.pp)]

    @property
    def string(self) -> str:
        """Megatron's layout string, expanded: "Ettt|tmmL"."""
        return "|".join("".join(chunk) for chunk in self.in_order)

    @property
    def mtp_stage(self) -> int | None:
        """Pipeline rank that holds the MTP layers, in its last chunk; None without MTP."""
        return next((p for p in range(self.pp) if "m" in self.chunks[p][-1]), None)

    @property
    def has_standalone_mtp(self) -> bool:
        """Whether the MTP layers are on another pipeline rank than the loss."""
        return self.mtp_stage is not None and self.mtp_stage != self.pp - 1

    def decoder_layers(self, pp_rank: int, vp_rank: int = 0) -> range:
        """Indices of the decoder layers of one chunk, counted from 0 over the whole model."""
        position = vp_rank * self.pp + pp_rank
        first = sum(chunk.count("t") for chunk in self.in_order[:position])
        return range(first, first + self.chunks[pp_rank][vp_rank].count("t"))
