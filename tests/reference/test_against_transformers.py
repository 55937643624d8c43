"""The judge judged: trunk logits, and MTP chains, equal those of `transformers`, which nobody here wrote, to 1e-10 in
fp64.

`transformers` casts to fp32 inside norms, softmax, RoPE and routers. Here fp32 means fp64 while its models are built
and run, so that the formulas are compared and not the casts.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from tests.reference.plain_model import LatentConfig, MoEConfig, PlainConfig, PlainMTPModel

transformers = pytest.importorskip("transformers", reason="the [hf] extra is not installed")
from transformers.modeling_layers import MtpLayer  # noqa: E402

pytestmark = pytest.mark.unit

TOKENS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(5))
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}
PLAIN_SIZES = {
    "num_layers": 3,
    "hidden_size": 24,
    "num_heads": 4,
    "vocab_size": 40,
    "ffn_size": 20,
    "eps": 1e-6,
    "rope_base": 1000.0,
}


@pytest.fixture
def fp64(monkeypatch):
    """fp32 means fp64 inside the modelling code of `transformers`."""
    in_fp64 = types.ModuleType("torch")
    in_fp64.__getattr__ = lambda name: torch.float64 if name in ("float32", "float") else getattr(torch, name)
    for family in ("qwen3", "qwen3_moe", "deepseek_v3"):
        name = f"transformers.models.{family}.modeling_{family}"
        __import__(name)
        monkeypatch.setattr(sys.modules[name], "torch", in_fp64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def hf_model(name: str, **fields):
    """A causal model of `transformers` with random weights; norms and expert biases are random too."""
    config = getattr(transformers, f"{name}Config")(**SIZES, **fields)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    randomize(model)
    return model


def randomize(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(1 + noise if "norm" in name else noise)


RENAMED = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attention",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "q_a_proj": "q_down",
    "q_b_proj": "q_up",
    "kv_a_proj_with_mqa": "kv_down",
    "kv_b_proj": "kv_up",
    "q_a_layernorm": "q_norm",
    "kv_a_layernorm": "kv_norm",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "shared_experts": "shared",
    "e_score_correction_bias": "expert_bias",
    "eh_proj": "projection",
    "mtp_block": "block",
    "post_norm": "final_norm",
}


def translate(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """One tensor of `transformers` under the plain model's names; stacked experts are taken apart."""
    name = name.replace("mlp.gate.weight", "mlp.router.weight").replace("mlp.gate.e_score", "mlp.e_score")
    parts = [RENAMED.get(part, part) for part in name.split(".")]
    prefix = ".".join(parts)
    if prefix.endswith("gate_up_proj"):
        stem = prefix.removesuffix(".gate_up_proj")
        halves = [(f"{stem}.{e}", *expert.chunk(2)) for e, expert in enumerate(tensor)]
        return {
            f"{expert}.{part}.weight": half
            for expert, *both in halves
            for part, half in zip(("gate", "up"), both, strict=True)
        }
    if tensor.dim() == 3:
        return {f"{prefix.removesuffix('.down')}.{e}.down.weight": expert for e, expert in enumerate(tensor)}
    return {prefix: tensor}


def load_from_transformers(plain: PlainMTPModel, model: nn.Module, mtp_layers: list[nn.Module] | None = None) -> None:
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.").replace("embed_tokens", "embedding").replace("lm_head", "head")
        weights |= translate("final_norm.weight" if name == "norm.weight" else name, tensor)
    for k, layer in enumerate(mtp_layers or []):
        for name, tensor in layer.state_dict().items():
            weights |= translate(f"mtp.{k}.{name}", tensor)
    plain.load_state_dict(weights, strict=True)


QWEN3 = {"num_key_value_heads": 2, "head_dim": 8}
QWEN3_MOE = QWEN3 | {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 10,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 7,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
GQA = {"num_groups": 2, "head_dim": 8, "qk_norm": True}
SOFTMAX_MOE = {"moe": MoEConfig(num_experts=6, topk=3, ffn_size=10), "moe_layers": (True, False, True)}
LATENT = LatentConfig(q_lora_rank=10, kv_lora_rank=8, qk_head_dim=6, qk_pos_emb_head_dim=4, v_head_dim=5)
SIGMOID_MOE = MoEConfig(
    num_experts=8,
    topk=4,
    ffn_size=7,
    shared_ffn_size=14,
    score_function="sigmoid",
    num_groups=4,
    group_topk=2,
    scaling_factor=2.5,
    expert_bias=True,
)
MLA_MOE = {"latent": LATENT, "moe": SIGMOID_MOE, "moe_layers": (False, True, True)}


@pytest.mark.parametrize(
    ("name", "fields", "plain_fields"),
    [
        ("Qwen3", QWEN3, GQA),
        ("Qwen3Moe", QWEN3_MOE, GQA | SOFTMAX_MOE),
        ("DeepseekV3", DEEPSEEK, MLA_MOE),
    ],
)
def test_trunk_logits(fp64, name, fields, plain_fields):
    model = hf_model(name, **fields)
    plain = PlainMTPModel(PlainConfig(**PLAIN_SIZES, **plain_fields)).double()
    load_from_transformers(plain, model)
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
        got = plain.logits(plain.hidden_states([TOKENS])[0], depth=0)
    assert expected.std() > 1  # a comparison of near-constant logits would say nothing
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "fields", "plain_fields"), [("Qwen3", QWEN3, GQA), ("DeepseekV3", DEEPSEEK, MLA_MOE)])
def test_mtp_chain(fp64, name, fields, plain_fields):
    """Two depths of `transformers`' own MTP layer, chained as its drafter chains them: each reads the hidden state of
    the depth before and the embedding of the token k ahead, at the position of the slot."""
    model = hf_model(name, **fields)
    norm_type = type(model.model.norm)
    layers = [MtpLayer(model.config, type(model.model.layers[-1]), norm_type, 2).double().eval() for _ in range(2)]
    for layer in layers:
        randomize(layer)
    layers[1].enorm.weight.data *= 1.5  # the two depths differ
    plain = PlainMTPModel(PlainConfig(**PLAIN_SIZES, **plain_fields, num_depths=2)).double()
    load_from_transformers(plain, model, layers)

    s = 10
    causal = torch.full((s, s), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        hidden = model.model(TOKENS[:, :s], use_cache=False).last_hidden_state
        rope = model.model.rotary_emb(hidden, torch.arange(s)[None])
        output = plain(TOKENS[:, : s + 1])
        for depth, layer in enumerate(layers, start=1):
            ahead = torch.zeros(2, s, dtype=torch.int64)  # id 0 where the sample of s + 1 tokens ends
            ahead[:, : s + 1 - depth] = TOKENS[:, depth : s + 1]
            hidden = layer(model.model.embed_tokens(ahead), hidden, rope, causal, None, None)
            torch.testing.assert_close(output.logits[depth], model.lm_head(hidden), rtol=0, atol=1e-10)
