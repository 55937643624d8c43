"""The tables, expanded for every recipe: they cover each tensor of the model once and use each file name once."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import prod

import pytest

from megatron_mtp.config.depths import Depths
from megatron_mtp.convert.hf_families import family_of, find_family
from megatron_mtp.convert.links import links, new_depth_links
from megatron_mtp.errors import ConversionError
from megatron_mtp.parallel.params import count_parameters
from megatron_mtp.recipes import RECIPES, get_recipe

pytestmark = pytest.mark.unit


def planned(recipe):
    """(model, family, depths that the form holds, links) of a recipe."""
    cfg = get_recipe(recipe)
    cfg.model.vocab_size = cfg.model.vocab_size or 1000
    model = cfg.finalize(None).model
    family = family_of(model)
    own = Depths.of(model).distinct
    depths = min(own, find_family(family).mtp_form.max_depths or own)
    return model, family, depths, links(model, family, depths)


@pytest.mark.parametrize("recipe", RECIPES)
def test_links_are_the_parameters_of_the_model(recipe):
    model, _, depths, found = planned(recipe)
    count = count_parameters(model)
    of_mtp = count.mtp * depths // Depths.of(model).distinct if depths else 0
    # Biases of routers are buffers, which the count leaves out.
    values = sum(prod(link.size) for link in found if not link.key.endswith("expert_bias"))
    assert values == count.main + of_mtp


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_tensor_is_covered_once(recipe):
    _, _, _, found = planned(recipe)
    boxes = defaultdict(list)
    for link in found:
        boxes[link.key, link.shape].append(link)
    assert len({key for key, _ in boxes}) == len(boxes), "a tensor has two shapes"
    for (key, whole), parts in boxes.items():
        assert sum(prod(part.size) for part in parts) == prod(whole), key
        assert len({part.offset for part in parts}) == len(parts), key
    uses = Counter(hf.name for link in found if link.arrangement != "part" for hf in link.theirs)
    assert set(uses.values()) == {1}
    rows = defaultdict(int)
    for link in found:
        if link.arrangement == "part":
            rows[link.theirs[0]] += link.size[0]
    assert all(total == hf.shape[0] for hf, total in rows.items())


@pytest.mark.parametrize("recipe", ["deepseek_v3", "tiny_mla_moe", "qwen3_30b_a3b", "smollm2_135m", "tiny_qwen3_next"])
def test_a_new_depth_has_the_tensors_of_a_depth(recipe):
    model, family, _, found = planned(recipe)
    new = {(link.key, link.offset, link.size) for link, _ in new_depth_links(model, family, 0)}
    assert new == {(link.key, link.offset, link.size) for link in found if link.key.startswith("mtp.layers.0.")}


def test_released_names_of_deepseek_v3():
    """From the index of the released model (facts of its files, not of the tables)."""
    _, _, _, found = planned("deepseek_v3")
    shapes = {hf.name: hf.shape for link in found for hf in link.theirs}
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert shapes["model.layers.61.shared_head.norm.weight"] == (7168,)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (18432, 7168)
    assert shapes["model.layers.3.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert shapes["model.layers.60.mlp.gate.e_score_correction_bias"] == (256,)
    assert shapes["model.layers.61.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes["model.layers.61.self_attn.q_b_proj.weight"] == (24576, 1536)
    assert "model.layers.62.enorm.weight" not in shapes


@pytest.mark.parametrize(
    ("field", "value"),
    [("mtp_variant", "parallel"), ("mtp_hidden_source", "pre_final_norm"), ("mtp_layer_mlp", "dense")],
)
def test_variants_without_a_form_are_refused(field, value):
    cfg = get_recipe("tiny_mla_moe")
    setattr(cfg.model, field, value)
    model = cfg.finalize(None).model
    with pytest.raises(ConversionError, match=rf"model\.{field} = '{value}'.*--mtp-depths 0"):
        links(model, "deepseek_v3")
    assert not any(link.key.startswith("mtp.") for link in links(model, "deepseek_v3", 0))
