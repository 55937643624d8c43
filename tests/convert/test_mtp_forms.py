"""MTP layers in the form of each family, against equations of the test and against transformers' own MTP model."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.convert.checking import check_hf
from megatron_mtp.convert.exporting import export_hf
from megatron_mtp.convert.importing import import_hf
from megatron_mtp.errors import ConversionError
from tests.convert.hf_models import COMMON, make, tokens
from tests.convert.mtp_forms import add_depths, reference_logits
from tests.convert.ours import logits
from tests.convert.test_families import EP2, PP2, TP2

pytestmark = pytest.mark.dist

LOGITS = 1e-5
COUNT = "num_nextn_predict_layers"
OWN_COUNT = "mtp_num_hidden_layers"
# model, form, depths, key of the count
CASES = {
    "deepseek_v3": ("deepseek_v3", "deepseek", 1, COUNT),
    "deepseek_v3_two_depths": ("deepseek_v3", "deepseek", 2, COUNT),
    "glm4_moe": ("glm4_moe", "deepseek", 1, COUNT),
    "qwen3": ("qwen3", "separate", 2, OWN_COUNT),
    "qwen3_moe": ("qwen3_moe", "separate", 1, OWN_COUNT),
    "qwen3_next": ("qwen3_next", "qwen", 1, COUNT),
    "llama_tied": ("llama", "separate", 2, OWN_COUNT),
    "mimo": ("mimo", "mimo", 1, COUNT),
    "mimo_two_depths": ("mimo", "mimo", 2, COUNT),
}


def same_up_to_the_tail(got, expected):
    """Depth k reads the ids rolled by k: its last k slots see the beginning, on both sides, and are left out."""
    for k in range(expected.shape[0]):
        until = expected.shape[2] - k
        assert (got[k, :, :until] - expected[k, :, :until]).abs().max() < LOGITS, f"depth {k}"


SLOW = {"glm4_moe", "qwen3_moe", "qwen3_next", "llama_tied", "mimo"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
def test_every_depth_is_what_the_released_weights_mean(case, ranks, tmp_path):
    name, form, num_depths, key = CASES[case]
    model, ids = make(name, tmp_path / "hf"), tokens()
    depths = add_depths(model, tmp_path / "hf", form, num_depths, key)
    expected = reference_logits(model, depths, ids, is_mimo=form == "mimo")
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    (got,) = ranks(1).run(logits, str(tmp_path / "checkpoint"), ids, {})
    same_up_to_the_tail(got, expected)
    export_hf(tmp_path / "checkpoint", tmp_path / "back", family="mimo" if form == "mimo" else None)
    first, back = stored(tmp_path / "hf"), stored(tmp_path / "back")
    assert first.keys() == back.keys()
    assert all(torch.equal(first[tensor], back[tensor]) for tensor in first)


def stored(folder):
    """(file below `folder`, name) -> tensor."""
    return {
        (str(file.relative_to(folder)), name): tensor
        for file in folder.rglob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(file).items()
    }


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe", "mixtral", "deepseek_v2"])
def test_readers_without_a_drafter_see_the_trunk_only(name, tmp_path):
    """vLLM's classes of these families refuse a name that they do not know. They read every *.safetensors of a folder,
    and no subfolder; transformers reads model.safetensors."""
    from transformers import AutoModelForCausalLM

    make(name, tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "grown", mtp_depths=2, mtp_init="fresh")
    report = export_hf(tmp_path / "grown", tmp_path / "out", shard_bytes=20_000)
    assert any("2 MTP layers are in mtp/" in note for note in report.notes)
    assert not report.left_out or not any(key.startswith("mtp.") for key in report.left_out)
    visible = {key for file in (tmp_path / "out").glob("*.safetensors") for key in safetensors.torch.load_file(file)}
    assert visible == safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors").keys()
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    assert check_hf(tmp_path / "grown", tmp_path / "out").is_equal
    import_hf(tmp_path / "out", tmp_path / "again")
    ours, again = StoredWeights(tmp_path / "grown"), StoredWeights(tmp_path / "again")
    assert ours.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(ours.whole(key), again.whole(key)) for key in ours.tensors)


@pytest.mark.parametrize("num_depths", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_transformers_drafts_with_the_exported_layers(name, num_depths, ranks, tmp_path, monkeypatch):
    """Greedy text with the drafter is greedy text without, and the drafter's logits are ours."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    model, ids = make(name, tmp_path / "hf"), tokens()
    add_depths(model, tmp_path / "hf", "deepseek", num_depths, COUNT)
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    # It looks for the layer number of the released model.
    first = COMMON["num_hidden_layers"]
    patterns = [rf"model\.layers\.{first + k}.*" for k in range(num_depths)]
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", patterns)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()

    (got,) = ranks(1).run(logits, str(tmp_path / "checkpoint"), ids, {})
    drafter = MtpModel.from_pretrained(loaded).eval()
    same_up_to_the_tail(got, _drafter_logits(loaded, drafter, ids, num_depths))

    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    greedy = loaded.generate(ids[:1], **settings)
    assert torch.equal(loaded.generate(ids[:1], use_mtp=True, **settings), greedy)


@torch.no_grad()
def _drafter_logits(model, drafter, ids, num_depths):
    out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    hidden, found = out.hidden_states[-1], [out.logits]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    for k in range(num_depths):
        rolled = torch.roll(ids, -(k + 1), dims=1)
        hidden = drafter.forward_layer(k, hidden, positions, None, input_ids=rolled)
        found.append(drafter._project_to_logits(hidden))
    return torch.stack(found)


@pytest.mark.parametrize("layout", [TP2, EP2, PP2], ids=["tp", "ep", "pp"])
def test_depths_at_two_ranks(layout, ranks, tmp_path):
    model, ids = make("deepseek_v3", tmp_path / "hf"), tokens()
    depths = add_depths(model, tmp_path / "hf", "deepseek", 1, COUNT)
    expected = reference_logits(model, depths, ids, is_mimo=False)
    found = [got for got in ranks(2).run(logits, str(tmp_path / "hf"), ids, layout) if got is not None]
    assert found
    for got in found:
        same_up_to_the_tail(got, expected)


def test_the_qwen_form_holds_one_depth(tmp_path):
    """Two depths in one projection cannot be written: refused, unless the caller leaves the second out."""
    make("qwen3_next", tmp_path / "qwen")
    import_hf(tmp_path / "qwen", tmp_path / "two", mtp_depths=2, mtp_init="fresh")
    with pytest.raises(ConversionError, match=r"mtp_num_layers = 2: files of qwen3_next hold 1"):
        export_hf(tmp_path / "two", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = export_hf(tmp_path / "two", tmp_path / "out", mtp_depths=1)
    assert any(key.startswith("mtp.layers.1.") for key in report.left_out)
    names = {name for file, name in stored(tmp_path / "out") if file == "model.safetensors"}
    assert {"mtp.fc.weight", "mtp.layers.0.input_layernorm.weight"} <= names
    assert not any(name.startswith("mtp.layers.1.") for name in names)
