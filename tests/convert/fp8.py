"""FP8 files in the form of DeepSeek-V3's release, made here as its README_WEIGHTS.md says: blocks of 128 x 128 values,
those at the edges filled with zeros for the scale and cut again."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tests.convert.mtp_forms import edit_config

QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
NOT_QUANTIZED = ("embed_tokens", "lm_head", "shared_head", "mlp.gate.", "eh_proj")


def quantize(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Values in e4m3 and one fp32 scale for each block, whose largest value becomes 448."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // block), -(-columns // block))
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = weight[part].float().abs().max() / 448
            values[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def quantize_folder(folder: Path, scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Rewrites a saved model as bf16 with FP8 matrices. Returns the tensors of the new file."""
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        if tensor.dim() == 2 and not any(part in name for part in NOT_QUANTIZED):
            values, scales = quantize(tensor)
            tensors[name], tensors[f"{name}_scale_inv"] = values, scales.to(scale_dtype)
        else:
            tensors[name] = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    edit_config(folder, quantization_config=QUANTIZATION, dtype="bfloat16")
    return tensors
