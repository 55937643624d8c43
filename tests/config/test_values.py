"""Quantities, loss factors, coercion, YAML, overrides, round trips."""

from __future__ import annotations

import copy
import math
import pickle
import time
import tracemalloc
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.coerce import MisfitError, check, coerce
from megatron_mtp.config.layout_text import expand_layout
from megatron_mtp.config.loss_factor import LossFactor
from megatron_mtp.config.overrides import apply_overrides, apply_yaml
from megatron_mtp.config.quantity import parse_quantity
from megatron_mtp.config.yaml_text import dump_yaml, load_yaml
from megatron_mtp.errors import ConfigError
from megatron_mtp.recipes import RECIPES, get_recipe

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "count"),
    [("10B", 10**10), ("14.8T", 148 * 10**11), (7, 7), ("2_000", 2000), ("1e9", 10**9), ("1.5 k", 1500), ("0", 0)],
)
def test_quantities(text, count):
    assert parse_quantity(text) == count


@pytest.mark.parametrize(
    "text", ["", "B", "-1", "1.5", "10X", "1e999", "nan", True, "1..5M", "0x10", "١٢", "1e99", "9" * 5000]
)
def test_what_is_no_quantity(text):
    with pytest.raises(ConfigError):
        parse_quantity(text)


def test_loss_factor_forms():
    steps = LossFactor.parse("0.3@0,0.1@10T")
    assert [steps.at(tokens) for tokens in (0, 10**13 - 1, 10**13, 10**15)] == [0.3, 0.3, 0.1, 0.1]
    line = LossFactor.parse("linear:0.3->0.1@1000")
    assert line.at(0) == 0.3
    assert line.at(500) == pytest.approx(0.2)
    assert line.at(1000) == line.at(5000) == pytest.approx(0.1)
    assert LossFactor.parse(0.1).at(10**9) == LossFactor.parse("0.1").at(0) == 0.1
    assert steps.extremes == line.extremes == (0.1, 0.3)


@pytest.mark.parametrize(
    "text",
    [
        -0.1,
        math.nan,
        math.inf,
        "x",
        "0.3@5",
        "0.3@0,0.1@0",
        "0.3@0,x@1B",
        "0.3@0,0.1@x",
        "linear:0.3",
        "linear:0.3->0.1",
        "٠.٣",
        10**400,
        "0.3@0,0.1@1e99",
        "",
        None,
        True,
    ],
)
def test_what_is_no_loss_factor(text):
    with pytest.raises(ConfigError):
        LossFactor.parse(text)


@settings(deadline=None)
@given(st.floats(0, 2), st.floats(0, 2), st.integers(0, 10**6), st.integers(0, 2 * 10**6))
def test_a_line_stays_between_its_ends(start, end, length, tokens):
    value = LossFactor((0, length), (start, end), is_linear=True).at(tokens)
    assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12


@pytest.mark.parametrize(
    ("value", "wanted", "fitted"),
    [
        ("8", int, 8),
        (8.0, int, 8),
        (1, float, 1.0),
        ("1e-4", float, 1e-4),
        (7, str, "7"),
        (None, int | None, None),
        ("10B", int | str | None, "10B"),
        (10, int | str | None, 10),
        (("a", 1), list, ["a", 1]),
        (["1", 2], list[int], [1, 2]),
        ({"a": 1}, dict[str, Any], {"a": 1}),
        (None, Literal["null", "bytes"], "null"),
        (True, bool, True),
        ("0.3@0,0.1@1B", float | str, "0.3@0,0.1@1B"),
    ],
)
def test_coercion(value, wanted, fitted):
    result = coerce(value, wanted)
    assert result == fitted
    assert type(result) is type(fitted)


@pytest.mark.parametrize(
    ("value", "wanted", "words"),
    [
        ("abc", int, "must be an integer"),
        ("١٢", int, "must be an integer"),
        ("١٢", float, "must be a number"),
        (True, int, "must be an integer"),
        (2.5, int, "must be an integer"),
        (math.inf, int, "must be an integer"),
        (1, bool, "must be true or false"),
        ("yes", bool, "must be true or false"),
        (None, int, "must be an integer"),
        ("tee", Literal["auto", "torch"], "must be one of 'auto', 'torch'"),
        ([1, "x"], list[int] | None, "must be a list, each item an integer or null"),
        ({1: 2}, dict[str, Any], "must be a mapping"),
        ([], str, "must be text"),
    ],
)
def test_misfits(value, wanted, words):
    with pytest.raises(MisfitError) as caught:
        coerce(value, wanted)
    assert words in str(caught.value)


@pytest.mark.parametrize(("value", "wanted"), [("8", int), (8.0, int), (7, str), (True, float), (1, Literal[True])])
def test_values_set_in_python_are_not_coerced(value, wanted):
    with pytest.raises(MisfitError):
        check(value, wanted)


NAMES = {f"name_{idx}": 1 for idx in range(20_000)}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(PLAIN)
def test_yaml_gives_back_what_it_wrote(data):
    if "${" in repr(data):
        return
    assert load_yaml(dump_yaml({"x": data}), "test") == {"x": data}


@pytest.mark.parametrize(
    "text", ["1e-4", "no", "on", "1:30", "0o7", "007", "null", "~", "1_000", "True", ".5", "<<", "=", "2020-01-01"]
)
def test_text_that_looks_like_something_else_stays_text(text):
    assert load_yaml(dump_yaml([text]), "test") == [text]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E8", 3e8),
        ("no", "no"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", 1000),
        (".inf", math.inf),
        ("true", True),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text, value):
    assert load_yaml(text, "test") == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!python/object/apply:os.system [x]", "cannot be read as YAML"),
        ("a: !custom 1", "cannot be read as YAML"),
        ("a: ${oc.env:HOME}", "interpolation"),
        ("a: [{b: 'x${y}'}]", "interpolation"),
        ("a: 1\na: 2", "given twice"),
        ("a: *x", "aliases"),
        ("a: &x 1", "anchors"),
        ("a: !!bool x", "tags"),
        ("a: !!map [1]", "tags"),
        ("a: ! 1", "tags"),
        ("[" * 22 + "]" * 22, "nested more than 20 deep"),
        ("a: [", "cannot be read as YAML"),
        ("[" * 5000, "YAML"),
    ],
)
def test_yaml_that_is_refused(text, words):
    with pytest.raises(ConfigError) as caught:
        load_yaml(text, "test")
    assert words in str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_round_trips(recipe, tmp_path):
    for cfg in (get_recipe(recipe), get_recipe(recipe).finalize()):
        assert ConfigContainer.from_yaml(cfg.to_yaml()) == cfg
        assert ConfigContainer.from_dict(cfg.to_dict()) == cfg
        cfg.to_yaml(tmp_path / "run.yaml")
        assert ConfigContainer.from_yaml(tmp_path / "run.yaml") == cfg
        assert pickle.loads(pickle.dumps(cfg)) == copy.deepcopy(cfg) == cfg
        assert pickle.loads(pickle.dumps(cfg)).is_frozen == cfg.is_frozen


OVERRIDES = [
    ("model.num_layers=8", ("model", "num_layers"), 8),
    ("train.train_iters=1e3", ("train", "train_iters"), 1000),
    ("train.train_iters=None", ("train", "train_iters"), None),
    ("train.train_iters=null", ("train", "train_iters"), None),
    ("checkpoint.save=007", ("checkpoint", "save"), "007"),
    ("checkpoint.save=a=b", ("checkpoint", "save"), "a=b"),
    ("tokenizer.tokenizer_type=null", ("tokenizer", "tokenizer_type"), "null"),
    ("model.moe_router_load_balancing_type=none", ("model", "moe_router_load_balancing_type"), "none"),
    ("dataset.blend=[[a_text_document, b], null]", ("dataset", "blend"), [["a_text_document", "b"], None]),
    ("dataset.split=9999,8,2", ("dataset", "split"), "9999,8,2"),
    ("model.pipeline_model_parallel_layout=[5, 6, 6, 4]", ("model", "pipeline_model_parallel_layout"), [5, 6, 6, 4]),
    ("model.pipeline_model_parallel_layout=Et*3|(tt|)*29m|L", ("model", "pipeline_model_parallel_layout"),
     "Et*3|(tt|)*29m|L"),
    ("model.mtp_loss_scaling_factor=linear:0.3->0.1@10T", ("model", "mtp_loss_scaling_factor"), "linear:0.3->0.1@10T"),
    ("train.train_tokens=10B", ("train", "train_tokens"), "10B"),
    ("model.mcore.softmax_scale=0.5", ("model", "mcore"), {"softmax_scale": 0.5}),
    ("dataset.valid_sets.code=[[c], null]", ("dataset", "valid_sets"), {"code": [["c"], None]}),
    ("optimizer.lr=1", ("optimizer", "lr"), 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "path", "value"), OVERRIDES)
def test_overrides(argument, path, value):
    cfg = get_recipe("tiny_dense")
    apply_overrides(cfg, [argument])
    assert getattr(getattr(cfg, path[0]), path[1]) == value


def test_bad_overrides_are_all_reported():
    bad = [
        ("model.nun_layers=1", "Did you mean model.num_layers?"),
        ("num_layers=2", "Write model.num_layers."),
        ("modl.x=1", "Did you mean model?"),
        ("model=3", "model is a section"),
        ("model.num_layers", "is written as section.field=value"),
        ("model.num_layers=abc", "model.num_layers = 'abc': must be an integer"),
        ("model.tensor_model_parallel_size=2.5", "must be an integer"),
        ("model.hidden_size.b=1", "holds no names"),
        ("model.kv_channels=${a}", "interpolation"),
        ("model._target_=os.system", "there is no such field"),
        ("mixed_precision=bf16_mixed", "Use precision.dtype"),
        ("model.add_cross_attention=true", "cross attention is not supported"),
        ("model.transformer_impl=local", "Use model.backend"),
        ("model.softmax_scale=0.5", "Megatron-Core has this field: write model.mcore.softmax_scale"),
        ("model.pipeline_model_parallel_split_rank=3", "Use model.pipeline_model_parallel_layout"),
    ]
    with pytest.raises(ConfigError) as caught:
        apply_overrides(get_recipe("tiny_dense"), [argument for argument, _ in bad])
    assert len(caught.value.problems) == len(bad)
    for problem, (_, words) in zip(caught.value.problems, bad, strict=True):
        assert words in str(problem)


def test_validation_sets_of_an_argument_are_added_to_those_of_the_recipe():
    cfg = get_recipe("tiny_dense")
    cfg.dataset.valid_sets = {"docs": ["d"], "code": ["c"]}
    apply_overrides(cfg, ["dataset.valid_sets={docs: [new], b: [y]}"])
    assert cfg.dataset.valid_sets == {"docs": ["new"], "code": ["c"], "b": ["y"]}


def test_yaml_overlays_merge_mappings_and_lose_to_arguments(tmp_path):
    path = tmp_path / "overlay.yaml"
    path.write_text(
        "model:\n  num_layers: 6\n  mcore: {softmax_scale: 0.5}\ntrain: {train_tokens: 10B, train_iters: null}\n"
    )
    cfg = get_recipe("tiny_dense")
    cfg.model.mcore = {"fp32_residual_connection": True}
    apply_yaml(cfg, path)
    apply_overrides(cfg, ["model.num_layers=8"])
    assert cfg.model.num_layers == 8
    assert cfg.model.mcore == {"fp32_residual_connection": True, "softmax_scale": 0.5}
    assert cfg.train.train_tokens == "10B"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: {}", "there is no such section"),
        ("model: 3", "must be a mapping of its fields"),
        ("- a", "must be a mapping of sections"),
        ("model: {num_layers: x}\ntrain: {trian_iters: 1}", "Did you mean train.train_iters?"),
        ("model: {_target_: os.system}", "there is no such field"),
    ],
)
def test_bad_yaml_overlays_change_nothing(text, words, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    cfg = get_recipe("tiny_dense")
    with pytest.raises(ConfigError) as caught:
        apply_yaml(cfg, path)
    assert words in str(caught.value)
    assert "bad.yaml" in str(caught.value)
    assert cfg == get_recipe("tiny_dense")


def test_config_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            apply_yaml(get_recipe("tiny_dense"), path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        apply_yaml(get_recipe("tiny_dense"), tmp_path / "binary.yaml")


def test_a_mistyped_attribute_names_the_nearest():
    cfg = get_recipe("tiny_dense")
    with pytest.raises(ConfigError, match=r"Did you mean model\.mtp_num_layers"):
        cfg.model.mtp_num_layer = 1
    with pytest.raises(AttributeError, match=r"Did you mean train\.train_iters"):
        _ = cfg.train.train_iter


@pytest.mark.parametrize(
    ("data", "owner"), [({"model": {"mcore": NAMES}}, r"model\.mcore"), ({"model": NAMES}, "model"), (NAMES, "config")]
)
def test_names_by_the_thousand_are_refused_at_once(data, owner):
    """A similar name is searched for each unknown one, which takes milliseconds."""
    start = time.process_time()
    with pytest.raises(ConfigError, match=rf"(?m)^{owner}: 20000 names are given") as caught:
        ConfigContainer.from_dict(data).finalize()
    assert sum("names are given" in str(problem) for problem in caught.value.problems) == 1
    assert len(caught.value.problems) < 10
    assert time.process_time() - start < 2


@pytest.mark.parametrize("text", ["(" * 50_000, "(t" * 50_000 + ")*2", "t*9999" * 10_000, f"({'t' * 90_000})*10000"])
def test_layouts_are_measured_before_they_are_expanded(text):
    tracemalloc.start()
    with pytest.raises(ValueError, match="symbol"):
        expand_layout(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * 2**20


def test_a_loss_factor_in_text_has_the_range_of_the_number():
    cfg = get_recipe("tiny_dense")
    cfg.model.update(mtp_num_layers=1, mtp_loss_scaling_factor="0.3@0,1e9@1B")
    with pytest.raises(ConfigError, match=r"mtp_loss_scaling_factor = .*at most 100"):
        cfg.finalize()
