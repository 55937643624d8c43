"""FP8 weights of Hugging Face files: what config.json says about them, and how they become ordinary numbers.

DeepSeek-V3's form, which Kimi-K2, Qwen3-FP8 and others share: a weight is e4m3, and `NAME_scale_inv` holds one factor
for each block of 128 x 128 values; blocks at the edges are cut off. Sources: DeepSeek-V3's README_WEIGHTS.md and
inference/kernel.py (weight_dequant_kernel); transformers 5.23 integrations/finegrained_fp8.py (Fp8Dequantize).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_mtp.errors import ConversionError

if TYPE_CHECKING:
    import torch

FP8_CODE = "F8_E4M3"
"""Code of the dtype of quantized weights in safetensors files."""
SCALE_ENDING = "_scale_inv"
SCALE_CODES = ("F32", "BF16", "F16", "F8_E8M0")
"""Dtypes of scales: DeepSeek-V3 and Kimi-K2 have F32, Qwen3-FP8 BF16, files with scale_fmt ue8m0 F8_E8M0 or F32."""
DEFAULT_BLOCK = (128, 128)

Block = tuple[int, int]
"""Rows and columns that share a scale."""


def block_of(config: dict[str, Any]) -> Block | None:
    """The block size of a config.json's quantized weights; None: it says that there are none.

    Raises:
        ConversionError: its `quantization_config` describes another method.
    """
    given = config.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ConversionError(f"config.json: quantization_config = {given!r}: must be an object.")
    method = given.get("quant_method")
    if method != "fp8":
        raise ConversionError(
            f"config.json: quantization_config.quant_method = {method!r}: only 'fp8' with one scale for each block of "
            "a weight is read (DeepSeek-V3, Kimi-K2). Convert another release of the model, or dequantize it first."
        )
    # Other values need another formula, or tensors besides the weight and its scales.
    fixed = {"fmt": "e4m3", "activation_scheme": "dynamic", "expert_dtype": "fp8"}
    wrong = [
        f"{key} = {given[key]!r}, and only {value!r} is read"
        for key, value in fixed.items()
        if given.get(key, value) != value
    ]
    if given.get("scale_fmt", "float") not in ("float", "ue8m0"):
        wrong.append(f"scale_fmt = {given['scale_fmt']!r}, and only 'float' and 'ue8m0' are read")
    block = given.get("weight_block_size", DEFAULT_BLOCK)
    if not _is_block(block):
        wrong.append(f"weight_block_size = {block!r}, and it must be two positive numbers, such as [128, 128]")
    if wrong:
        raise ConversionError(f"config.json: quantization_config: {'; '.join(wrong)}.")
    return block[0], block[1]


def _is_block(block: Any) -> bool:
    if not isinstance(block, list | tuple) or len(block) != 2:
        return False
    return all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in block)


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Shape of the scales of a weight [rows, columns]. A block at the edge has a scale too."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def scale_problem(shape: tuple[int, ...], scales: tuple[str, tuple[int, ...]] | None, block: Block) -> str | None:
    """What is wrong with the scales of an FP8 weight, to follow its name; None: nothing.

    Args:
        shape: of the weight.
        scales: dtype code and shape; None: there are none.
    """
    if scales is None:
        return f"is {FP8_CODE} without its scales {SCALE_ENDING}."
    if len(shape) != 2:
        return f"is {FP8_CODE} of shape {list(shape)}; only matrices have blocks."
    code, found = scales
    needed = scale_shape(shape, block)
    if found != needed:
        return (
            f"of shape {list(shape)} has scales of shape {list(found)}; blocks of {block[0]} x {block[1]} need "
            f"{list(needed)} (weight_block_size in config.json)."
        )
    if code not in SCALE_CODES:
        return f"has scales of dtype {code}; {', '.join(SCALE_CODES)} are read."
    return None


def dequantized(values: torch.Tensor, scales: torch.Tensor, block: Block, dtype: torch.dtype) -> torch.Tensor:
    """Weight [rows, columns] = values x the scale of their block: multiplied in fp32, then rounded to `dtype`.

    One row of blocks is in memory as fp32 at a time.

    Args:
        values: [rows, columns], e4m3.
        scales: of `scale_shape`.
    """
    import torch

    weight = torch.empty(values.shape, dtype=dtype)
    factors = scales.to(torch.float32)
    for index, row in enumerate(factors):
        rows = slice(index * block[0], (index + 1) * block[0])
        weight[rows] = values[rows].to(torch.float32) * row.repeat_interleave(block[1])[: values.shape[1]]
    return weight
