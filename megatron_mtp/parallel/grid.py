"""Parallel sizes of a job, and the pipeline stage of each rank in Megatron's order."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGrid:
    """Parallel sizes and the order of ranks.

    The fastest axis comes first: tp-cp-dp-pp for dense parts, etp-ep-edp-pp for experts; with `pp_before_dp` the last
    two change places (Megatron's use_tp_pp_dp_mapping).

    Args:
        world_size: number of ranks.
        etp: tensor parallel size inside an expert; None: tp.

    Raises:
        ConfigError: a product of sizes does not divide the world size, or the pipeline groups of dense and expert parts
            would differ.

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
        dense, expert = self.tp * self.cp * self.pp, self.expert_tp * self.ep * self.pp
        if self.world_size % dense or self.world_size % expert:
            raise ConfigError(
                f"world size {self.world_size}: it must be a multiple of tp {self.tp} x cp {self.cp} x pp {self.pp} = "
                f"{dense} and of etp {self.expert_tp} x ep {self.ep} x pp {self.pp} = {expert}."
            )
        if self.pp_before_dp and self.pp > 1 and self.dp_size != self.expert_dp_size:
            raise ConfigError(
                f"dist.use_tp_pp_dp_mapping: the data parallel size of dense parts ({self.dp_size}) and of experts "
                f"({self.expert_dp_size}) must be equal when the pipeline axis is not the last one."
            )

    @classmethod
    def from_config(cls, cfg: ConfigContainer, world_size: int) -> RankGrid:
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
