"""FP8 files are read as DeepSeek's code and transformers dequantize them, bit for bit; others are refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch

from megatron_mtp.convert.checking import check_hf
from megatron_mtp.convert.exporting import export_hf
from megatron_mtp.convert.importing import import_hf
from megatron_mtp.convert.quantization import dequantized
from megatron_mtp.errors import ConversionError
from tests.convert.fp8 import QUANTIZATION, quantize, quantize_folder
from tests.convert.hf_models import make
from tests.convert.mtp_forms import add_depths, edit_config

pytestmark = pytest.mark.unit

# Several blocks, and blocks at the edges: a hidden size of 160, 268 rows of latents and rotary keys.
WIDTHS = {"hidden_size": 160, "intermediate_size": 300, "moe_intermediate_size": 136, "kv_lora_rank": 264}
NAME = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(folder in the form of DeepSeek-V3's release with one MTP layer, its tensors)."""
    folder = tmp_path_factory.mktemp("released") / "hf"
    model = make("deepseek_v3", folder, **WIDTHS)
    add_depths(model, folder, "deepseek", 1, "num_nextn_predict_layers")
    return folder, quantize_folder(folder)


def reference(values, scales, block=128):
    """DeepSeek's weight_dequant_kernel: each value as fp32, times the scale of its block, stored as bf16."""
    rows = torch.arange(values.shape[0])[:, None] // block
    columns = torch.arange(values.shape[1])[None] // block
    return (values.to(torch.float32) * scales.to(torch.float32)[rows, columns]).bfloat16()


def test_an_import_holds_the_bits_of_their_dequantization(released, tmp_path):
    folder, tensors = released
    report = import_hf(folder, tmp_path / "run")
    assert set(report.read) | set(report.duplicated) == set(tensors)
    scales = [name for name in tensors if name.endswith("_scale_inv")]
    assert f"{len(scales)} FP8 weights were dequantized to bf16" in report.notes[-1]
    export_hf(tmp_path / "run", tmp_path / "back")
    back = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() - set(scales)
    for name, tensor in back.items():
        scale = tensors.get(f"{name}_scale_inv")
        expected = tensors[name] if scale is None else reference(tensors[name], scale)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), name
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert check_hf(tmp_path / "run", folder).is_equal
    edges = {tuple(size % 128 for size in tensors[name.removesuffix("_scale_inv")].shape) for name in scales}
    assert (268 % 128, 160 % 128) in edges  # two blocks and a part of one, both ways


def test_the_bits_are_those_of_transformers():
    """Its loader (Fp8Dequantize) cannot read blocks at the edges; its backward pass (_dequantize_fp8_weight) can."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

    draw = torch.Generator().manual_seed(3)
    for shape in ((256, 384), (272, 160), (100, 128), (576, 7168)):
        weight = torch.randn(shape, generator=draw) * torch.rand(shape[0], 1, generator=draw)
        values, scales = quantize(weight)
        ours = dequantized(values, scales, (128, 128), torch.bfloat16)
        theirs = _dequantize_fp8_weight(values, scales, [128, 128], torch.float32).bfloat16()
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, reference(values, scales))
        if not any(size % 128 for size in shape):
            loader = Fp8Dequantize(None)
            assert torch.equal(ours, loader._dequantize_one(values, scales, torch.bfloat16))
        assert (ours.float() - weight).abs().max() < weight.abs().max() / 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_other_dtypes(dtype, tmp_path):
    """Qwen3-FP8 has bf16 scales, files with scale_fmt ue8m0 powers of two."""
    make("qwen3", tmp_path / "hf")
    tensors = quantize_folder(tmp_path / "hf", dtype)
    edit_config(tmp_path / "hf", quantization_config=QUANTIZATION | {"scale_fmt": "ue8m0"})
    import_hf(tmp_path / "hf", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "back")
    back = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    for name in (NAME, "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(back[name], reference(tensors[name], tensors[f"{name}_scale_inv"]))


def test_depths_that_are_left_out_leave_their_scales_out(released, tmp_path):
    report = import_hf(released[0], tmp_path / "run", mtp_depths=0)
    assert "model.layers.3.self_attn.o_proj.weight_scale_inv" in report.left_out


DAMAGES = {
    "a missing scale": (lambda t: t.pop(f"{NAME}_scale_inv"), rf"{NAME} is F8_E4M3 without its scales"),
    "a scale alone": (
        lambda t: t.update({NAME: t[NAME].bfloat16()}),
        rf"{NAME}_scale_inv scales no FP8 weight: {NAME} is BF16",
    ),
    "too few scales": (
        lambda t: t.update({f"{NAME}_scale_inv": torch.ones(1, 1)}),
        r"has scales of shape \[1, 1\]; blocks of 128 x 128 need \[2, 1\]",
    ),
    "integer scales": (
        lambda t: t.update({f"{NAME}_scale_inv": torch.ones(2, 1, dtype=torch.int32)}),
        "has scales of dtype I32",
    ),
    "NaN": (lambda t: t[f"{NAME}_scale_inv"][0].fill_(float("nan")), rf"{NAME} holds \d+ values that are NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_and_scales_must_match(damage, released, tmp_path):
    folder, tensors = released
    shutil.copytree(folder, tmp_path / "hf")
    edit, message = DAMAGES[damage]
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(changed)
    safetensors.torch.save_file(changed, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "compressed-tensors"}, r"quant_method = 'compressed-tensors': only 'fp8'"),
        ({"fmt": "e5m2"}, "fmt = 'e5m2', and only 'e4m3' is read"),
        ({"activation_scheme": "static"}, "activation_scheme = 'static'"),
        ({"weight_block_size": None}, "weight_block_size = None, and it must be two positive numbers"),
        ({"weight_block_size": [128, 0]}, "weight_block_size = .128, 0."),
        ({"scale_fmt": "int"}, "scale_fmt = 'int'"),
        (None, "is F8_E4M3, and config.json has no quantization_config"),
    ],
)
def test_other_methods_are_refused_by_name(changes, message, released, tmp_path):
    shutil.copytree(released[0], tmp_path / "hf")
    edit_config(tmp_path / "hf", quantization_config=None if changes is None else QUANTIZATION | changes)
    with pytest.raises(ConversionError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "out")


def test_dequantized_files_with_the_old_config_are_read_as_they_are(tmp_path):
    """DeepSeek's fp8_cast_bf16.py writes weights only, so people copy the config.json of the FP8 files."""
    make("qwen3", tmp_path / "hf")
    edit_config(tmp_path / "hf", quantization_config=QUANTIZATION)
    report = import_hf(tmp_path / "hf", tmp_path / "run")
    assert "says that weights are FP8, and none is" in report.notes[-1]
