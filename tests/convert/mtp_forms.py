"""MTP layers of released files, read independently: names and equations are written out here, not taken from the
package.

    h_k = norm( block( M [enorm(Emb(t[i+k])); hnorm(h_{k-1})] ) ),   logits_k = Head(h_k),   h_0 after the final norm

MiMo's M reads [hidden; embedding] (XiaomiMiMo/vllm mimo_mtp.py: torch.cat([previous_hidden_states, inputs_embeds])),
and its h_0 is the hidden state before the final norm (mimo.py: the norm is in compute_logits). The others read
[embedding; hidden] (deepseek_mtp.py, glm4_moe_mtp.py, qwen3_next_mtp.py). `separate` is this project's own form, in a
subfolder, for families that were released without MTP layers.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tests.convert.hf_models import randomize


@dataclass
class Depth:
    """One MTP layer: its tensors by role, and its block as a module of transformers."""

    embedding_norm: Tensor
    hidden_norm: Tensor
    projection: Tensor
    final_norm: Tensor
    block: Any


def names_of(form: str, depth_idx: int, num_layers: int) -> dict[str, str]:
    """Role -> name in the files; `block` is the prefix of the transformer layer."""
    if form == "deepseek":
        prefix = f"model.layers.{num_layers + depth_idx}."
        own = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
        block = prefix
    elif form == "qwen":
        prefix, block = "mtp.", f"mtp.layers.{depth_idx}."
        own = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    elif form == "separate":
        prefix = block = f"mtp.layers.{depth_idx}."
        own = ("enorm", "hnorm", "eh_proj", "norm")
    else:
        prefix = block = f"model.mtp_layers.{depth_idx}."
        own = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
    roles = ("embedding_norm", "hidden_norm", "projection", "final_norm")
    return {role: f"{prefix}{name}.weight" for role, name in zip(roles, own, strict=True)} | {"block": block}


def add_depths(model: Any, folder: Path, form: str, num_depths: int, count_key: str) -> list[Depth]:
    """Gives the saved model of `folder` random MTP layers in `form`, and says so in its config.json."""
    path = folder / "model.safetensors"
    tensors = trunk = safetensors.torch.load_file(path)
    if form == "separate":
        path, tensors = folder / "mtp" / "model.safetensors", {}
        path.parent.mkdir()
    num_layers, h = model.config.num_hidden_layers, model.config.hidden_size
    generator = torch.Generator().manual_seed(9)
    depths = []
    for depth_idx in range(num_depths):
        block = copy.deepcopy(model.model.layers[-1])
        randomize(block, seed=20 + depth_idx)
        norms = [1 + 0.1 * torch.randn(h, generator=generator) for _ in range(3)]
        projection = 0.1 * torch.randn(h, 2 * h, generator=generator)
        depths.append(Depth(norms[0], norms[1], projection, norms[2], block))
        names = names_of(form, depth_idx, num_layers)
        for role in ("embedding_norm", "hidden_norm", "projection", "final_norm"):
            tensors[names[role]] = getattr(depths[-1], role).clone()
        tensors |= {
            names["block"] + name: tensor for name, tensor in file_tensors(block, model.config.model_type).items()
        }
        if form == "deepseek":
            tensors[names["block"] + "embed_tokens.weight"] = trunk["model.embed_tokens.weight"].clone()
            tensors[names["block"] + "shared_head.head.weight"] = trunk["lm_head.weight"].clone()
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    edit_config(folder, **{count_key: num_depths})
    return depths


def edit_config(folder: Path, **values: Any) -> None:
    """Changes keys of a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def file_tensors(block: Any, model_type: str) -> dict[str, Tensor]:
    """A layer's tensors as files hold them: experts one by one, where transformers stacks them in memory."""
    found = {}
    for name, tensor in block.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, fused in enumerate(tensor):
                gate, up = fused.chunk(2)
                found[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate.clone()
                found[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up.clone()
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                found[name.replace("down_proj", f"{expert}.down_proj.weight")] = down.clone()
        else:
            found[name] = tensor.clone()
    return found


@torch.no_grad()
def reference_logits(model: Any, depths: list[Depth], ids: Tensor, is_mimo: bool) -> Tensor:
    """[1 + D, b, s, v] by the equations above, on a trunk of transformers."""
    body, offset = model.model, int(model.config.model_type == "qwen3_next")  # its norms multiply by 1 + weight
    into_norm: list[Tensor] = []
    hook = body.norm.register_forward_pre_hook(lambda _, inputs: into_norm.append(inputs[0]))
    out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    hook.remove()
    hidden, logits = into_norm[0] if is_mimo else out.hidden_states[-1], [out.logits]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    for k, depth in enumerate(depths, start=1):
        embedded = rms_norm(body.embed_tokens(torch.roll(ids, -k, dims=1)), depth.embedding_norm + offset)
        normed = rms_norm(hidden, depth.hidden_norm + offset)
        pair = (normed, embedded) if is_mimo else (embedded, normed)
        projected = torch.cat(pair, dim=-1) @ depth.projection.T
        rotary = body.rotary_emb(projected, position_ids=positions)
        output = depth.block(projected, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        hidden = rms_norm(output[0] if isinstance(output, tuple) else output, depth.final_norm + offset)
        logits.append(model.lm_head(hidden))
    return torch.stack(logits)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
