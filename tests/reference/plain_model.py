"""A plain PyTorch model of what the project trains: trunk, MTP modules, shared embedding and head, objective.

It is the judge of parity tests, so it is written from the definitions and shares no code with what it judges. Run it in
fp64: `PlainMTPModel(cfg).double()`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.reference.plain_config import LatentConfig, MoEConfig, PlainConfig
from tests.reference.plain_layers import Block, Norm
from tests.reference.plain_moe import RouterRecord, updated_expert_bias
from tests.reference.plain_objective import PlainOutput, PlainTotals, combine, cross_entropies, depth_view

__all__ = [
    "LatentConfig",
    "MoEConfig",
    "PlainConfig",
    "PlainMTPModel",
    "PlainOutput",
    "PlainTotals",
    "combine",
    "depth_view",
]


class MTPModule(nn.Module):
    """One depth.

    Sequential: h_k = norm(block(M [enorm(Emb(t[i+k])); hnorm(h_{k-1})])); parallel: h_k = norm(block(h_0)).
    """

    def __init__(self, cfg: PlainConfig):
        super().__init__()
        h = cfg.hidden_size
        self.is_sequential = cfg.mtp_variant == "sequential"
        if self.is_sequential:
            self.enorm, self.hnorm = Norm(cfg, h), Norm(cfg, h)
            self.projection = nn.Linear(2 * h, h, bias=False)
        dense = replace(cfg, ffn_size=cfg.mtp_ffn_size or cfg.ffn_size)
        self.block = Block(dense, cfg.is_moe(-1) and cfg.mtp_ffn_size is None)
        self.final_norm = Norm(cfg, h)

    def forward(
        self, hidden: Tensor, embedded: Tensor, positions: Tensor, allowed: Tensor, routers: list[RouterRecord]
    ) -> Tensor:
        """[b, s, h] of the depth before (parallel: of the trunk) -> [b, s, h] for the head and the next depth."""
        if self.is_sequential:
            hidden = self.projection(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        return self.final_norm(self.block(hidden, positions, allowed, routers))


class PlainMTPModel(nn.Module):
    """Trunk and D MTP depths on whole tensors.

    The trunk's own prediction always reads the hidden state after the final norm. Depth 1 reads the trunk after the
    final norm, or before it with `mtp_hidden="pre_final_norm"`; depth k+1 reads what depth k gave to the head, after
    that depth's final norm, as Megatron-Core does. RoPE turns slot i by position i at every depth.
    """

    def __init__(self, cfg: PlainConfig, seed: int = 0):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.rows_of_embedding, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, cfg.is_moe(layer_idx)) for layer_idx in range(cfg.num_layers))
        self.final_norm = Norm(cfg, cfg.hidden_size)
        self.head = None if cfg.tied else nn.Linear(cfg.hidden_size, cfg.rows_of_embedding, bias=False)
        self.mtp = nn.ModuleList(
            MTPModule(cfg) for _ in range(1 if cfg.num_depths and cfg.mtp_repeated else cfg.num_depths)
        )
        self.randomize(seed)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("mtp.") or not cfg.mtp_freeze_trunk)

    def randomize(self, seed: int, std: float = 0.2) -> None:
        """Weights at which every formula shows: nothing is zero, no norm is one, logits differ clearly."""
        generator = torch.Generator().manual_seed(seed)
        norm_weights = {id(m.weight): m.offset for m in self.modules() if isinstance(m, Norm)}
        with torch.no_grad():
            for parameter in self.parameters():
                noise = std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise + (1 - norm_weights[id(parameter)]) if id(parameter) in norm_weights else noise)
            for name, buffer in self.named_buffers():
                if name.endswith("expert_bias"):
                    buffer.copy_(std * torch.randn(buffer.shape, generator=generator, dtype=torch.float64))

    def hidden_states(
        self,
        inputs: list[Tensor],
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        routers: list[RouterRecord] | None = None,
    ) -> list[Tensor]:
        """What the head reads at depths 0..D.

        Args:
            inputs: 1+D times [b, s]: the tokens, then t[i+k] for k = 1..D.
            segment_ids: [b, s]; given, attention stays inside a document.
            position_ids: [b, s] for RoPE; None: slot i has position i.
        """
        cfg, routers = self.cfg, [] if routers is None else routers
        b, s = inputs[0].shape
        positions = torch.arange(s).expand(b, s) if position_ids is None else position_ids
        allowed = torch.ones(s, s, dtype=torch.bool).tril().expand(b, s, s)
        if segment_ids is not None:
            allowed = allowed & (segment_ids[:, :s, None] == segment_ids[:, None, :s])

        x = self.embedding(inputs[0])
        for layer in self.layers:
            x = layer(x, positions, allowed, routers)
        result = [self.final_norm(x)]
        trunk = x if cfg.mtp_hidden == "pre_final_norm" else result[0]
        hidden = trunk = trunk.detach() if cfg.mtp_detach else trunk
        for depth in range(1, cfg.num_depths + 1):
            embedded = self.embedding(inputs[depth])
            embedded = embedded.detach() if cfg.mtp_detach else embedded
            module = self.mtp[0 if cfg.mtp_repeated else depth - 1]
            hidden = module(trunk if cfg.mtp_variant == "parallel" else hidden, embedded, positions, allowed, routers)
            result.append(hidden)
        return result

    def logits(self, hidden: Tensor, depth: int) -> Tensor:
        """[b, s, h] -> [b, s, vocab_size]; the rows that pad the vocabulary are left out."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        weight = weight.detach() if depth > 0 and self.cfg.mtp_detach else weight
        return hidden @ weight[: self.cfg.vocab_size].T

    def forward(
        self,
        tokens: Tensor,
        base_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> PlainOutput:
        """One micro-batch.

        Args:
            tokens: [b, s+1] ids.
            base_mask: [b, s], nonzero where the target t[i+1] counts; None: all count.
            segment_ids: [b, s] or [b, s+1]; given, attention and targets stay inside a document.
            position_ids: [b, s] for RoPE; None: slot i has position i.
        """
        base_mask = torch.ones_like(tokens[:, 1:]) if base_mask is None else base_mask
        views = [depth_view(tokens, base_mask, segment_ids, depth) for depth in range(1 + self.cfg.num_depths)]
        routers: list[RouterRecord] = []
        hidden = self.hidden_states([view.inputs for view in views], segment_ids, position_ids, routers)
        logits = [self.logits(h, depth) for depth, h in enumerate(hidden)]
        return PlainOutput(
            cfg=self.cfg,
            sums=torch.stack(
                [(cross_entropies(z, v.labels) * v.valid).sum() for z, v in zip(logits, views, strict=True)]
            ),
            counts=torch.stack([v.valid.sum() for v in views]),
            z_sums=torch.stack(
                [(torch.logsumexp(z, -1) ** 2 * v.valid).sum() for z, v in zip(logits, views, strict=True)]
            ),
            labels=torch.stack([v.labels for v in views]),
            valid=torch.stack([v.valid for v in views]),
            top1=torch.stack([z.argmax(-1) for z in logits]),
            logits=logits,
            routers=routers,
        )

    def global_batch(self, micro_batches: Iterable[dict[str, Tensor]]) -> PlainTotals:
        """Totals of a global batch given as keyword arguments of `forward`, one dict for each micro-batch."""
        return combine([self(**micro_batch) for micro_batch in micro_batches])

    def routed_blocks(self) -> list[Block]:
        """The block behind each entry of `PlainOutput.routers`."""
        depths = [self.mtp[0 if self.cfg.mtp_repeated else depth] for depth in range(self.cfg.num_depths)]
        return [block for block in (*self.layers, *(module.block for module in depths)) if block.is_moe]

    @torch.no_grad()
    def update_expert_biases(self, totals: PlainTotals) -> None:
        """The step of auxiliary-loss-free balancing; a repeated layer counts the tokens of all its applications."""
        counts: dict[Block, Tensor] = {}
        for block, tokens in zip(self.routed_blocks(), totals.tokens_per_expert, strict=True):
            counts[block] = counts.get(block, 0) + tokens
        for block, tokens in counts.items():
            block.mlp.expert_bias.copy_(
                updated_expert_bias(block.mlp.expert_bias, tokens, self.cfg.moe.bias_update_rate)
            )
