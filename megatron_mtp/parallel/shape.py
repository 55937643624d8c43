"""What follows from a config and the number of processes before a layout is chosen; the planner works with it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mtp.config.container import ConfigContainer
from megatron_mtp.config.depths import Depths
from megatron_mtp.config.filled import filled
from megatron_mtp.config.mcore.rules import unfit_for_grouped_mm
from megatron_mtp.config.phase_configs import fewest_processes
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.config.units import DTYPE_BYTES
from megatron_mtp.parallel.grid import RankGrid
from megatron_mtp.parallel.params import linear_pattern, moe_pattern, mtp_dense_width

MIN_LOGITS_CHUNK, MAX_LOGITS_CHUNK = 64, 1024


def default_logits_chunk(num_tokens: float, logit_bytes: int) -> int:
    """Tokens in a chunk of logits: at most a quarter of the memory of all `num_tokens` in fp32.

    Smaller chunks than MIN_LOGITS_CHUNK would make slow products, larger ones than MAX_LOGITS_CHUNK gain nothing.
    """
    return max(MIN_LOGITS_CHUNK, min(MAX_LOGITS_CHUNK, int(num_tokens // logit_bytes)))


def has_grouped_experts(model: ModelConfig, *, use_te: bool, is_cpu: bool) -> bool:
    """Whether all local experts of a finalized model share one grouped product; see model.moe_grouped_gemm.

    The default is what is faster: on a CPU torch's grouped product is a loop over the experts too, after a copy of
    their weights (docs/decisions.md, "Experts without Transformer Engine").
    """
    if model.num_moe_experts is None:
        return False
    if model.moe_grouped_gemm is not None:
        return model.moe_grouped_gemm
    return use_te or not (is_cpu or unfit_for_grouped_mm(model))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunShape:
    """Sizes of a run.

    Args:
        cfg: finalized.
        world_size: processes of the job.
        grid: parallel sizes and the order of ranks.
        depths: MTP depths and layers.
        is_moe: for each decoder layer, whether it has experts.
        is_linear: for each decoder layer, whether its attention is linear. MTP layers have full attention.
    """

    cfg: ConfigContainer
    world_size: int
    grid: RankGrid
    depths: Depths
    is_moe: tuple[bool, ...]
    is_linear: tuple[bool, ...]

    @classmethod
    def of(cls, cfg: ConfigContainer, world_size: int | None = None) -> RunShape:
        """The shape of a config that is finalized for `world_size`; None: the fewest that hold one replica."""
        size = fewest_processes(cfg) if world_size is None else world_size
        return RunShape(
            cfg=cfg,
            world_size=size,
            grid=RankGrid.of(cfg, size),
            depths=Depths.of(cfg.model),
            is_moe=tuple(moe_pattern(cfg.model)),
            is_linear=tuple(linear_pattern(cfg.model)),
        )

    @property
    def num_moe_layers(self) -> int:
        """Mixture-of-experts layers of the complete model; a repeated MTP layer counts once."""
        return sum(self.is_moe) + (mtp_dense_width(self.cfg.model) is None) * self.depths.distinct

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one rank in one step at the final global batch size.

        Rounded where the number of processes is open and the batch does not fit the fewest.
        """
        train, model = self.cfg.train, self.cfg.model
        unit = model.pipeline_model_parallel_size if model.virtual_pipeline_model_parallel_size > 1 else 1
        count = train.global_batch_size // (train.micro_batch_size * self.grid.dp_size)
        return max(1, count // unit) * unit

    @property
    def layer_kinds(self) -> list[str]:
        """Kind of each decoder layer: "dense" or "moe", after "linear " if its attention is linear."""
        pairs = zip(self.is_moe, self.is_linear, strict=True)
        return [("linear " if linear else "") + ("moe" if is_moe else "dense") for is_moe, linear in pairs]

    @property
    def mtp_kind(self) -> str:
        """Kind of the MTP layers, always with full attention; "mtp dense": dense with a width of their own."""
        width = mtp_dense_width(self.cfg.model)
        if width is None:
            return "moe"
        return "dense" if width == self.cfg.model.ffn_hidden_size else "mtp dense"

    def dense_width(self, kind: str) -> int:
        """Width of the feed-forward block of a layer without experts."""
        model = self.cfg.model
        return filled(model.mtp_ffn_hidden_size) if kind == "mtp dense" else model.ffn_hidden_size

    @property
    def item_bytes(self) -> int:
        """Bytes of one number in precision.dtype."""
        return DTYPE_BYTES[self.cfg.precision.dtype]

    @property
    def tokens(self) -> float:
        """Tokens of one micro-batch on a tensor-parallel group."""
        return self.cfg.train.micro_batch_size * self.cfg.model.seq_length / self.cfg.model.context_parallel_size

    @property
    def hidden_shards(self) -> int:
        """Ranks of a tensor-parallel group that share one hidden state."""
        return self.cfg.model.tensor_model_parallel_size if self.cfg.model.sequence_parallel else 1

    @property
    def hidden_bytes(self) -> float:
        """One hidden state on one rank: what goes from layer to layer and from stage to stage."""
        return self.tokens * self.cfg.model.hidden_size * self.item_bytes / self.hidden_shards

    @property
    def logits_chunk_tokens(self) -> int:
        """Tokens whose logits exist at once, on one rank."""
        given = self.cfg.model.logits_chunk_tokens
        return default_logits_chunk(self.tokens, self.logit_bytes) if given is None else given

    @property
    def logit_bytes(self) -> int:
        """Bytes held for each logit of a chunk: fp32, and a copy in precision.dtype.

        Under tensor parallelism the chunk before is held too, while its statistics travel.
        """
        waiting = 4 if self.cfg.model.tensor_model_parallel_size > 1 else 0
        return 4 + waiting + (self.item_bytes if self.item_bytes < 4 else 0)
