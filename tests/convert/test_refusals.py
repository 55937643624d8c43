"""What does not fit is named, and nothing is written. Layouts of saving do not matter."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch

from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.convert.checking import check_hf
from megatron_mtp.convert.exporting import export_hf
from megatron_mtp.convert.importing import import_hf
from megatron_mtp.errors import CheckpointError, ConversionError
from tests.convert.hf_models import make
from tests.convert.mtp_forms import add_depths, edit_config

pytestmark = pytest.mark.unit

NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A DeepSeek-like model with one MTP layer, in several files."""
    folder = tmp_path_factory.mktemp("whole")
    model = make("deepseek_v3", folder / "one")
    add_depths(model, folder / "one", "deepseek", 1, "num_nextn_predict_layers")
    import_hf(folder / "one", folder / "checkpoint")
    export_hf(folder / "checkpoint", folder / "hf", shard_bytes=30_000)
    return folder


@pytest.fixture
def qwen(tmp_path):
    make("qwen3", tmp_path / "hf")
    return tmp_path / "hf"


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def rename(tensors):
    tensors["model.layers.1.self_attn.key_proj.weight"] = tensors.pop(NAME)


DAMAGES = {
    "missing": (lambda t: t.pop(NAME), rf"{NAME} is missing"),
    "extra": (
        lambda t: t.update({"model.layers.1.extra.weight": torch.ones(3)}),
        r"layers\.1\.extra\.weight has no place",
    ),
    "renamed": (rename, rf"{NAME} is missing\. Did you mean model\.layers\.1\.self_attn\.key_proj\.weight\?"),
    "shape": (
        lambda t: t.update({NAME: t[NAME][:8].clone()}),
        rf"{NAME} has shape \[8, 32\], the model needs \[16, 32\]",
    ),
    "dtype": (lambda t: t.update({NAME: t[NAME].half()}), rf"{NAME} is F16, the weights are F32"),
    "NaN": (lambda t: t[NAME][2, 3:5].fill_(float("nan")), rf"{NAME} holds 2 values that are NaN or infinite"),
    "integers": (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), rf"{NAME} is I8, the weights are F32"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_import_names_what_is_wrong(damage, qwen, tmp_path):
    edit, message = DAMAGES[damage]
    change(qwen, edit)
    with pytest.raises(ConversionError, match=message):
        import_hf(qwen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_models_in_one_folder_are_refused(whole, tmp_path):
    """transformers reads model.safetensors, other readers the index."""
    shutil.copytree(whole / "hf", tmp_path / "hf")
    shutil.copyfile(whole / "one" / "model.safetensors", tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"holds model\.safetensors beside model\.safetensors\.index\.json"):
        import_hf(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_files(dtype, qwen, tmp_path):
    """Many files on the hub are bf16 under a config.json that says float32."""
    change(qwen, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    edit_config(qwen, dtype="float32")
    import_hf(qwen, tmp_path / "out")
    export_hf(tmp_path / "out", tmp_path / "back")
    first, back = (safetensors.torch.load_file(f / "model.safetensors") for f in (qwen, tmp_path / "back"))
    assert all(back[name].dtype == dtype and torch.equal(back[name], first[name]) for name in first)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_float64_is_refused(qwen, tmp_path):
    change(qwen, lambda t: t.update({name: tensor.double() for name, tensor in t.items()}))
    with pytest.raises(ConversionError, match="the tensors are F64"):
        import_hf(qwen, tmp_path / "out")


def test_tensors_without_elements_are_left_out(tmp_path):
    """transformers stores shared experts of width 0 where a model has none."""
    make("deepseek_v3", tmp_path / "hf", n_shared_experts=0)
    report = import_hf(tmp_path / "hf", tmp_path / "out")
    assert len(report.left_out) == 6
    assert all("shared_experts" in name for name in report.left_out)


def test_nan_in_a_checkpoint_is_not_exported(qwen, tmp_path, monkeypatch):
    from megatron_mtp.checkpoint.stored import StoredWeights

    import_hf(qwen, tmp_path / "out")
    read = StoredWeights.read
    monkeypatch.setattr(StoredWeights, "read", lambda *args: read(*args) / 0)
    with pytest.raises(ConversionError, match="NaN or infinite"):
        export_hf(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("name", "dense"), [("deepseek_v3", {"first_k_dense_replace": 3}), ("qwen3_next", {"mlp_only_layers": [0]})]
)
def test_a_dense_mtp_layer_has_no_reader(name, dense, tmp_path):
    """transformers and vLLM build an MTP layer with experts; ours is like the trunk's last layer."""
    make(name, tmp_path / "hf", **dense)
    import_hf(tmp_path / "hf", tmp_path / "two", mtp_depths=1, mtp_init="fresh")
    with pytest.raises(ConversionError, match=r"moe_layer_freq = .* expect experts in MTP layers"):
        export_hf(tmp_path / "two", tmp_path / "back")
    export_hf(tmp_path / "two", tmp_path / "back", mtp_depths=0)


def test_a_dense_model_in_a_form_with_experts(qwen, tmp_path):
    import_hf(qwen, tmp_path / "out")
    for family in ("deepseek_v3", "glm4_moe", "qwen3_moe", "mixtral", "qwen3_next"):
        with pytest.raises(ConversionError, match=r"num_moe_experts = None: \w+ has routed experts"):
            export_hf(tmp_path / "out", tmp_path / "back", family=family)


def test_everything_wrong_is_named_at_once(qwen, tmp_path):
    for damage in ("shape", "extra"):
        change(qwen, DAMAGES[damage][0])
    with pytest.raises(ConversionError, match=r"(?s)extra\.weight.*k_proj\.weight has shape"):
        import_hf(qwen, tmp_path / "out")


def test_a_truncated_shard_is_named(whole, tmp_path):
    shutil.copytree(whole / "hf", tmp_path / "hf")
    shard = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ConversionError, match=rf"{shard.name}: has .* bytes .* truncated"):
        import_hf(tmp_path / "hf", tmp_path / "out")
    shard.write_bytes(content[:5])
    with pytest.raises(ConversionError, match=rf"{shard.name}: is not a safetensors file"):
        import_hf(tmp_path / "hf", tmp_path / "out")
    shard.unlink()
    with pytest.raises(ConversionError, match=rf"{shard.name}: cannot be read"):
        import_hf(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_index_and_files_must_agree(whole, tmp_path):
    shutil.copytree(whole / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, index["weight_map"]["made.up"] = "model.norm.weight", index["weight_map"]["model.norm.weight"]
    del index["weight_map"][name]
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"(?s)lacks made\.up.*holds model\.norm\.weight"):
        import_hf(tmp_path / "hf", tmp_path / "out")


def test_shards_of_an_export_are_whole(whole):
    index = json.loads((whole / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    parts = {}
    for file in sorted(set(index["weight_map"].values())):
        parts |= safetensors.torch.load_file(whole / "hf" / file)
    first = safetensors.torch.load_file(whole / "one" / "model.safetensors")
    assert parts.keys() == first.keys()
    assert all(torch.equal(parts[name], first[name]) for name in first)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in parts.values())


def test_a_duplicate_that_differs_cannot_be_carried(whole, tmp_path):
    shutil.copytree(whole / "one", tmp_path / "hf")
    change(tmp_path / "hf", lambda t: t["model.layers.3.shared_head.head.weight"].add_(1))
    with pytest.raises(ConversionError, match=r"layers\.3\.shared_head\.head\.weight differs from lm_head\.weight"):
        import_hf(tmp_path / "hf", tmp_path / "out")


def test_duplicates_may_be_left_out(whole, tmp_path):
    report = export_hf(whole / "checkpoint", tmp_path / "hf", mtp_duplicates=False)
    names = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert not any("shared_head.head" in name or "layers.3.embed_tokens" in name for name in names)
    assert report.duplicated == []
    import_hf(tmp_path / "hf", tmp_path / "again")


def test_layers_that_config_json_counts_must_be_there(whole, tmp_path):
    """transformers saves the count of MTP layers and drops the layers."""
    shutil.copytree(whole / "one", tmp_path / "hf")
    change(tmp_path / "hf", lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.3.")])
    import_hf(tmp_path / "hf", tmp_path / "out", mtp_depths=0)
    assert not any(key.startswith("mtp.") for key in StoredWeights(tmp_path / "out").tensors)
    with pytest.raises(ConversionError, match=r"holds no MTP layers"):
        import_hf(tmp_path / "hf", tmp_path / "other", mtp_depths=1)


def test_a_damaged_checkpoint_is_not_exported(whole, tmp_path):
    shutil.copytree(whole / "checkpoint", tmp_path / "checkpoint")
    file = next((tmp_path / "checkpoint").glob("iter_*/__0_0.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: its checksum"):
        export_hf(tmp_path / "checkpoint", tmp_path / "out")
    file.write_bytes(bytes(content[:-10]))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp.* bytes"):
        export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_disk_that_refuses_leaves_nothing(whole, tmp_path, monkeypatch):
    from megatron_mtp.checkpoint import boxes
    from megatron_mtp.convert.tensor_writer import TensorWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorWriter, "write", full)
    with pytest.raises(ConversionError, match="No space left"):
        export_hf(whole / "checkpoint", tmp_path / "hf")
    monkeypatch.setattr(boxes, "save_tensor", full)
    with pytest.raises(CheckpointError, match="No space left"):
        import_hf(whole / "one", tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(whole, tmp_path):
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        import_hf(whole / "one", whole / "checkpoint")
    with pytest.raises(ConversionError, match="not empty"):
        export_hf(whole / "checkpoint", whole / "hf")


def test_a_recipe_must_be_the_same_model(qwen, tmp_path):
    from megatron_mtp.recipes import get_recipe

    with pytest.raises(
        ConversionError, match=r"(?s)Choose another recipe.*hidden_size: the recipe has 64, config\.json means 32"
    ):
        import_hf(qwen, tmp_path / "out", get_recipe("tiny_dense"))


def test_check_finds_one_changed_value(whole, tmp_path):
    assert check_hf(whole / "checkpoint", whole / "hf").is_equal
    shutil.copytree(whole / "one", tmp_path / "hf")
    change(tmp_path / "hf", lambda t: t["model.layers.2.mlp.experts.5.up_proj.weight"][3, 4].add_(0.5))
    result = check_hf(whole / "checkpoint", tmp_path / "hf")
    assert list(result.different) == ["model.layers.2.mlp.experts.5.up_proj.weight"]
    assert abs(result.different["model.layers.2.mlp.experts.5.up_proj.weight"] - 0.5) < 1e-6


def test_a_quantized_or_unknown_file_is_refused(qwen, tmp_path):
    edit_config(qwen, quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(ConversionError, match=r"quantization_config\.quant_method = 'compressed-tensors'"):
        import_hf(qwen, tmp_path / "out")
    edit_config(qwen, quantization_config=None, model_type="unheard_of")
    with pytest.raises(ConversionError, match="unheard_of"):
        import_hf(qwen, tmp_path / "out")


def test_bf16_keeps_its_router_bias_in_fp32(whole, tmp_path):
    report = export_hf(whole / "checkpoint", tmp_path / "hf", dtype="bf16")
    tensors = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    kinds = {name for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16}
    assert kinds == {name for name in report.written if name.endswith("e_score_correction_bias")}
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "again")
    again = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in tensors)
