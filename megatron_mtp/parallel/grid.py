"""Parallel sizes of a job, and the pipeline stage of each rank in Megatron's order."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mtp.config.container import ConfigContainer


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGrid:
    """Parallel sizes and the order of ranks.

    The fastest axis comes first: tp-cp-dp-pp for dense parts, etp-ep-edp-pp for experts; with `pp_before_dp` the last
    two change places (Megatron's use_tp_pp_dp_mapping).

    Args:
        world_size: number of ranks.
        etp: tensor parallel size inside an expert; None: tp.

    Source: megatron-core 0.19.2, parallel_state.py `RankGenerator` and `initialize_model_parallel`.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    pp_before_dp: bool = False

    def __post_init__(self) -> None:
        dense, expert = self.tp * self.cp, self.expert_tp * self.ep
        fits = self.world_size % (dense * self.pp) == self.world_size % (expert * self.pp) == 0
        assert fits, f"finalize({self.world_size}) refuses {self}"
        assert not self.pp_before_dp or self.pp == 1 or dense == expert, f"finalize refuses {self}"

    @classmethod
    def of(cls, cfg: ConfigContainer, world_size: int) -> RankGrid:
        """The grid of a config on `world_size` ranks."""
        model = cfg.model
        return cls(
            world_size=world_size,
            tp=model.tensor_model_parallel_size,
            pp=model.pipeline_model_parallel_size,
            cp=model.context_parallel_size,
            ep=model.expert_model_parallel_size,
            etp=model.expert_tensor_parallel_size,
            pp_before_dp=cfg.dist.use_tp_pp_dp_mapping,
        )

    @property
    def expert_tp(self) -> int:
        """Tensor parallel size inside an expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def dp_size(self) -> int:
        """Data parallel replicas of dense weights, context parallel ranks not counted."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def expert_dp_size(self) -> int:
        """Data parallel replicas of an expert's weights."""
        return self.world_size // (self.expert_tp * self.ep * self.pp)

    def stage(self, rank: int) -> int:
        """Pipeline stage of a rank.

        Example: world size 8, tp=2, pp=2: rank 5 is on stage 1; with `pp_before_dp` on stage 0.
        """
        if self.pp_before_dp:
            return rank // (self.tp * self.cp) % self.pp
        return rank * self.pp // self.world_size
