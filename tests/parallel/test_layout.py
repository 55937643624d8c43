"""Layouts: every layer placed once, Megatron's grammar, every rule refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtp.config.layout_text import expand_layout, layout_chunks
from megatron_mtp.config.sections import ModelConfig
from megatron_mtp.errors import PlanError
from megatron_mtp.parallel.layout import PipelineLayout

pytestmark = pytest.mark.unit


def make(layout, num_layers=4, depths=2, pp=2, vp=1) -> PipelineLayout:
    model = ModelConfig(num_layers=num_layers, mtp_num_layers=depths, pipeline_model_parallel_size=pp)
    model.virtual_pipeline_model_parallel_size = vp
    model.pipeline_model_parallel_layout = layout
    return PipelineLayout.of(model)


def assert_every_layer_once(layout: PipelineLayout, num_layers: int, depths: int) -> None:
    flat = layout.string.replace("|", "")
    assert flat == "E" + "t" * num_layers + "m" * depths + "L"
    placed = [idx for p in range(layout.pp) for v in range(layout.vp) for idx in layout.decoder_layers(p, v)]
    assert sorted(placed) == list(range(num_layers))


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 6), st.integers(0, 8), st.integers(0, 80))
def test_even_places_every_layer_once_and_evenly(pp, vp, depths, extra):
    vp = vp if pp > 1 else 1
    num_layers = pp * vp + extra
    layout = make("even", num_layers, depths, pp, vp)
    assert_every_layer_once(layout, num_layers, depths)
    weights = [chunk.count("t") + chunk.count("m") for chunk in layout.in_order]
    assert all(layout.in_order), "no chunk is empty"
    if pp * vp > 1:
        assert max(weights[:-1]) - min(weights[:-1]) <= 1
        if depths <= (num_layers + depths) // (pp * vp):
            assert max(weights) - min(weights) <= 1
            assert weights[-1] == min(weights)
        assert layout.mtp_stage == (pp - 1 if depths else None)
    assert not layout.has_standalone_mtp


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 4))
def test_a_list_places_every_layer_once(counts, depths):
    layout = make(counts, sum(counts), depths, pp=len(counts))
    assert_every_layer_once(layout, sum(counts), depths)
    assert [chunk.count("t") for chunk in layout.in_order] == counts


@pytest.mark.parametrize(
    ("num_layers", "depths", "pp", "vp", "expected"),
    [
        (4, 2, 2, 1, "Ettt|tmmL"),
        (4, 0, 2, 1, "Ett|ttL"),
        (5, 1, 4, 1, "Et|tt|tt|mL"),
        (8, 1, 1, 1, "EttttttttmL"),
        (61, 1, 16, 1, "Ettt|" + "tttt|" * 14 + "ttmL"),
        (8, 1, 2, 2, "Ett|tt|ttt|tmL"),
        (4, 6, 2, 1, "Etttt|mmmmmmL"),
        (3, 1, 2, 2, "Et|t|t|mL"),
        (2, 0, 2, 2, "E|t|t|L"),
        (3, 1, 3, 2, "E|t|t|t|m|L"),
    ],
)
def test_auto_examples(num_layers, depths, pp, vp, expected):
    assert make("even", num_layers, depths, pp, vp).string == expected


def test_standalone_mtp_and_order_of_virtual_chunks():
    layout = make("Et|t|t|t|t|t|mm|L", num_layers=6, pp=4, vp=2)
    assert layout.chunks[2] == (("t",), ("m", "m"))
    assert layout.mtp_stage == 2
    assert layout.has_standalone_mtp
    assert layout.decoder_layers(1, 1) == range(5, 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Et*3|(tt|)*29m|L", ["Ettt", *["tt"] * 29, "m", "L"]),
        ("Ettt|(tt|)*2,m|L", ["Ettt", "tt", "tt", "m", "L"]),
        ("E|t*12|L", ["E", "t" * 12, "L"]),
        ("(|ab)*1".replace("ab", "tt") + "|", ["", "tt", ""]),
    ],
)
def test_grammar(text, expected):
    assert expand_layout(text) == expected


@settings(deadline=None)
@given(st.text(alphabet="Etm|L,()*23 x", max_size=14))
def test_grammar_is_megatrons(text):
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    try:
        theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
    except AssertionError:
        with pytest.raises(ValueError, match="unknown symbol"):
            expand_layout(text)
    else:
        assert expand_layout(text) == ["".join(letters[kind.name] for kind in chunk) for chunk in theirs]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.lists(st.sampled_from("Ettmm|L"), max_size=14), st.booleans())
def test_whatever_we_accept_megatron_accepts(pp, vp, symbols, valid_ends):
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    text = "".join(symbols)
    text = f"Et|{text}|L" if valid_ends else text
    num_layers, depths = text.count("t"), text.count("m")
    _, problems = layout_chunks(text, num_layers=num_layers, num_depths=depths, pp=pp, vp=vp)
    if not problems:
        theirs = PipelineParallelLayerLayout(text, pp)
        standalone = theirs.validate_layer_layout(num_layers, depths)
        ours = make(text, num_layers, depths, pp, vp)
        assert theirs.virtual_pipeline_model_parallel_size == ours.vp
        assert bool(standalone) == ours.has_standalone_mtp


@pytest.mark.parametrize(
    ("layout", "kwargs", "words"),
    [
        ("Ett|xtmmL", {}, "unknown symbol 'x'"),
        ("Ett|t*99999999mmL", {}, "repeated more than"),
        ("Ett|(ttmmL", {}, "unknown symbol '('"),
        ("Ett|tt|mmL", {}, "3 chunks, which model.pipeline_model_parallel_size = 2 does not divide"),
        ("Et|t|t|tmmL", {}, "set model.virtual_pipeline_model_parallel_size = 2"),
        ("Et|tmmL", {}, "2 decoder layers"),
        ("Ett|ttmL", {}, "1 MTP layers"),
        ("tEt|ttmmL", {}, "E must stand first"),
        ("Ett|ttmmLE", {}, "L must stand last"),
        ("Ett|tmtmL", {}, "stands after an MTP layer"),
        ("Ettt||tm|mL", {"pp": 4}, "chunk 2 is empty"),
        ("Ettt|tm|mL", {"pp": 3}, "all MTP layers (m) must be in one chunk"),
        ("Ettttmm|L", {}, "cannot be on the first pipeline rank"),
        ("Et|t|t|t|mm|L", {"pp": 2, "vp": 3}, "cannot be on the first pipeline rank"),
        ("Ett|ttmm||L", {"pp": 2, "vp": 2}, "last virtual chunk"),
        ([2, 2, 2], {}, "3 entries"),
        ([2, 3], {}, "places 5 decoder layers"),
        ([5, -1], {}, "negative"),
        ([4, 0, 0], {"pp": 3}, "chunk 2 is empty"),
        ("even", {"num_layers": 1, "pp": 5}, "Use model.pipeline_model_parallel_size=3, or more layers"),
        ("even", {"num_layers": 1, "vp": 2}, "model.virtual_pipeline_model_parallel_size=1, or more layers"),
    ],
)
def test_rules_are_refused_by_name(layout, kwargs, words):
    with pytest.raises(PlanError) as caught:
        make(layout, **kwargs)
    assert words in str(caught.value)
