"""The gated delta net and gated attention against transformers' Qwen3-Next modules and a recurrence token by token.

The maps between the two sets of weights are written out here; the converter has its own.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import UnsupportedError
from megatron_mtp.mcore.groups import destroy_model_parallel, init_model_parallel
from megatron_mtp.model.torch_backend import build_layer_spec
from megatron_mtp.model.torch_backend import gated_delta_net as module_under_test
from megatron_mtp.recipes import get_recipe
from tests.model.torch_backend.tiny import delta_net_config

transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")
from transformers.models.qwen3_next import modeling_qwen3_next as hf  # noqa: E402 - after importorskip

pytestmark = pytest.mark.dist
KEYS, VALUES, KEY_WIDTH, VALUE_WIDTH, H, S = 2, 4, 8, 6, 32, 70  # S: more than one chunk of 64


def hf_config() -> object:
    return transformers.Qwen3NextConfig(
        hidden_size=H,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=KEYS,
        linear_num_value_heads=VALUES,
        linear_key_head_dim=KEY_WIDTH,
        linear_value_head_dim=VALUE_WIDTH,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
        attn_implementation="eager",
    )


def randomize(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 + (1 if name in ("norm.weight", "dt_bias", "A_log") else 0))


def ours(is_linear: bool, changes: dict | None = None) -> nn.Module:
    """One attention module of the torch backend on one rank."""
    groups = init_model_parallel(tp=1, pp=1, vp=None, cp=1, ep=1, etp=1, embedding_stages=[0])
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = delta_net_config(**(changes or {}))
    spec = build_layer_spec(config, is_moe=False, is_linear=is_linear).submodules.self_attention
    return build_module(spec, config=config, layer_number=1, pg_collection=groups)


def delta_net_weights(theirs: nn.Module) -> dict[str, Tensor]:
    """Rows of in_proj_qkvz and in_proj_ba lie key head by key head: [q, k, values of the group, gates of the group]."""
    ratio = VALUES // KEYS
    qkvz = theirs.in_proj_qkvz.weight.unflatten(0, (KEYS, -1))
    q, k, v, z = qkvz.split([KEY_WIDTH, KEY_WIDTH, ratio * VALUE_WIDTH, ratio * VALUE_WIDTH], dim=1)
    beta, alpha = theirs.in_proj_ba.weight.unflatten(0, (KEYS, -1)).split([ratio, ratio], dim=1)
    return {
        "in_proj.weight": torch.cat([part.flatten(0, 1) for part in (q, k, v, z, beta, alpha)]),
        "conv1d.weight": theirs.conv1d.weight,
        "dt_bias": theirs.dt_bias,
        "A_log": theirs.A_log,
        "out_norm.weight": theirs.norm.weight,
        "out_proj.weight": theirs.out_proj.weight,
    }


def inputs() -> Tensor:
    return torch.randn(2, S, H, generator=torch.Generator().manual_seed(12))


def linear_attention_differences() -> dict[str, float]:
    """Output, and gradient of the input and of every parameter, of ours, theirs, and the recurrence in fp64."""
    theirs = hf.Qwen3NextGatedDeltaNet(hf_config(), layer_idx=0)
    randomize(theirs)
    module = ours(is_linear=True)
    try:
        module.load_state_dict({name: w.detach().clone() for name, w in delta_net_weights(theirs).items()})
        x, y = inputs(), inputs().transpose(0, 1).contiguous().requires_grad_(True)
        got = module(y, None)[0].transpose(0, 1)
        weights = {name: w.detach().double().requires_grad_(True) for name, w in delta_net_weights(theirs).items()}
        exact_x = x.double().requires_grad_(True)
        exact = recurrence(weights, exact_x)
        probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(13))
        (got * probe).sum().backward()
        (exact * probe.double()).sum().backward()
        found = {"theirs": relative(got, theirs(x)), "exact": relative(got, exact)}
        found["input"] = relative(y.grad.transpose(0, 1), exact_x.grad)
        return found | {name: relative(p.grad, weights[name].grad) for name, p in module.named_parameters()}
    finally:
        destroy_model_parallel()


def recurrence(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The complete layer, token by token."""
    sizes = [KEYS * KEY_WIDTH] * 2 + [VALUES * VALUE_WIDTH] * 2 + [VALUES] * 2
    q, k, v, z, beta, alpha = (x @ w["in_proj.weight"].T).split(sizes, dim=-1)
    qkv = torch.cat([q, k, v], dim=-1)
    taps = w["conv1d.weight"][:, 0]
    padded = F.pad(qkv, (0, 0, taps.shape[1] - 1, 0))
    qkv = F.silu(sum(padded[:, i : i + S] * taps[:, i] for i in range(taps.shape[1])))
    q, k, v = qkv.split(sizes[:3], dim=-1)
    q, k = (t.unflatten(-1, (KEYS, KEY_WIDTH)).repeat_interleave(VALUES // KEYS, dim=2) for t in (q, k))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    v, z = (t.unflatten(-1, (VALUES, VALUE_WIDTH)) for t in (v, z))
    decay = torch.exp(-w["A_log"].exp() * F.softplus(alpha + w["dt_bias"]))
    out = delta_rule(q, k, v, beta.sigmoid(), decay)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["out_norm.weight"] * F.silu(z)
    return out.flatten(2) @ w["out_proj.weight"].T


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """S <- a S (1 - b k k^T) + b v k^T as the paper writes it; reads S q / sqrt(width)."""
    state, outputs = q.new_zeros(q.shape[0], VALUES, VALUE_WIDTH, KEY_WIDTH), []
    for t in range(S):
        state = decay[:, t, :, None, None] * state
        read = torch.einsum("bhvk,bhk->bhv", state, k[:, t])
        update = beta[:, t, :, None] * (v[:, t] - read)
        state = state + update[..., None] * k[:, t, :, None]
        outputs.append(torch.einsum("bhvk,bhk->bhv", state, q[:, t]) / KEY_WIDTH**0.5)
    return torch.stack(outputs, dim=1)


def gated_attention_difference() -> float:
    """Full attention with a gate and zero-centred norms, partly rotated, against theirs."""
    config = hf_config()
    theirs = hf.Qwen3NextAttention(config, layer_idx=1)
    randomize(theirs)
    module = ours(is_linear=False)
    try:
        # q_proj has [query, gate] for each head; linear_qkv has, for each group, queries, gates, key, value.
        q, gate = theirs.q_proj.weight.unflatten(0, (4, 2, 8)).unbind(1)
        k, v = (p.weight.unflatten(0, (2, 1, 8)) for p in (theirs.k_proj, theirs.v_proj))
        q, gate = (t.unflatten(0, (2, 2)) for t in (q, gate))
        module.linear_qkv.weight.data.copy_(torch.cat([q, gate, k, v], dim=1).flatten(0, 2))
        module.linear_proj.weight.data.copy_(theirs.o_proj.weight)
        module.q_layernorm.weight.data.copy_(theirs.q_norm.weight)
        module.k_layernorm.weight.data.copy_(theirs.k_norm.weight)
        x = inputs()
        causal = torch.full((S, S), float("-inf")).triu(1)[None, None]
        rope = hf.Qwen3NextRotaryEmbedding(config)(x, torch.arange(S)[None])
        expected = theirs(x, rope, causal)[0]
        table = RotaryEmbedding(8, rotary_percent=0.5, rotary_base=1000, use_cpu_initialization=True)(S)
        return relative(module(x.transpose(0, 1), None, rotary_pos_emb=table)[0].transpose(0, 1), expected)
    finally:
        destroy_model_parallel()


def chunk_and_token_by_token(chunk: int, dtype: torch.dtype) -> dict[str, float]:
    """Strong decays, up to exp(-16) for a token, where sums of logarithms reach hundreds."""
    generator = torch.Generator().manual_seed(14)
    shape = (2, S, VALUES)
    q, k = (F.normalize(torch.randn(*shape, KEY_WIDTH, generator=generator), dim=-1) for _ in range(2))
    v = torch.randn(*shape, VALUE_WIDTH, generator=generator)
    beta, g = torch.rand(shape, generator=generator), -16 * torch.rand(shape, generator=generator)
    leaves = [[x.to(kind).clone().requires_grad_(True) for x in (q, k, v, beta, g)] for kind in (dtype, torch.float64)]
    (q, k, v, beta, g), exact = leaves
    got = module_under_test.chunked_gated_delta_rule(q, k, v, g=g, beta=beta, chunk=chunk)[0]
    want = delta_rule(*exact[:4], exact[4].exp())
    probe = torch.randn(got.shape, generator=generator)
    (got * probe).sum().backward()
    (want * probe.double()).sum().backward()
    names = ("query", "key", "value", "beta", "g")
    grads = {name: relative(a.grad, b.grad) for name, a, b in zip(names, *leaves, strict=True)}
    return {"output": relative(got, want)} | grads


@pytest.mark.parametrize("chunk", [1, 16, 64, 128])
def test_chunks_do_not_matter(chunk):
    found = chunk_and_token_by_token(chunk, torch.float32)
    assert max(found.values()) < 1e-6, found


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_linear_attention(ranks):
    found = ranks(1).run(linear_attention_differences)[0]
    assert max(found.values()) < 3e-6, found


def test_gated_attention(ranks):
    assert ranks(1).run(gated_attention_difference)[0] < 1e-6


def test_a_gpu_needs_the_kernels(monkeypatch):
    class OnGPU(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(module_under_test.torch, "empty", lambda *args, **kwargs: OnGPU())
    monkeypatch.setattr(module_under_test.torch.cuda, "current_device", lambda: 0)
    with pytest.raises(UnsupportedError, match="flash-linear-attention"):
        module_under_test._uses_kernels(delta_net_config())
    assert not module_under_test._uses_kernels(delta_net_config(deterministic_mode=True))


@pytest.mark.unit
def test_documents_cannot_be_kept_apart():
    cfg: ConfigContainer = get_recipe("tiny_dense")
    cfg.model.experimental_attention_variant, cfg.model.linear_attention_freq = "gated_delta_net", 2
    cfg.copy().finalize()
    cfg.dataset.reset_attention_mask = True
    with pytest.raises(UnsupportedError, match=r"reset_attention_mask = True.*gated_delta_net"):
        cfg.finalize()
