"""What a field states about itself holds: ranges are checked, nothing of a finalized config changes, all are read."""

from __future__ import annotations

import ast
import copy
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

import megatron_mtp
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.coerce import field_types
from megatron_mtp.config.frozen import FrozenDict, FrozenList
from megatron_mtp.config.knob import INT64_MAX, Range, is_path, may_be_address, mcore_fields, range_of
from megatron_mtp.config.sections import section_types
from megatron_mtp.config.yaml_text import dump_yaml, load_yaml
from megatron_mtp.errors import ConfigError
from megatron_mtp.recipes import RECIPES, get_recipe

pytestmark = pytest.mark.unit

SECTIONS = section_types()
FIELDS = [(section, name) for section, kind in SECTIONS.items() for name in field_types(kind)]


def number_types(wanted: Any) -> set[type]:
    """int and float, where a field accepts them, also as items of a list."""
    found = {wanted} & {int, float}
    return found.union(*(number_types(arg) for arg in get_args(wanted) if isinstance(arg, type) or get_args(arg)))


NUMBERS = [(s, n) for s, n in FIELDS if number_types(field_types(SECTIONS[s])[n])]


def outside(limits: Range, kinds: set[type]) -> Iterator[float]:
    """Numbers just below and above a range, and those that no range holds."""
    below, above = (-math.inf, math.inf) if float in kinds else (None, None)
    if limits.gt is not None:
        yield limits.gt
    if limits.ge is not None:
        yield limits.ge - 1 if below is None else math.nextafter(limits.ge, below)
    if limits.lt is not None:
        yield limits.lt
    if limits.le is not None:
        yield limits.le + 1 if above is None else math.nextafter(limits.le, above)
    yield from (math.nan, math.inf, -math.inf) if float in kinds else (INT64_MAX + 1,)


def test_every_number_has_a_range_with_two_ends():
    for section, name in NUMBERS:
        limits = range_of(SECTIONS[section], name)
        assert limits is not None, f"{section}.{name}"
        assert limits.gt is not None or limits.ge is not None, f"{section}.{name} has no lower bound"
        assert limits.lt is not None or limits.le is not None, f"{section}.{name} has no upper bound"


@pytest.mark.parametrize(("section", "name"), NUMBERS)
def test_a_value_outside_its_range_is_refused(section, name):
    kind = SECTIONS[section]
    wanted, limits = field_types(kind)[name], range_of(kind, name)
    takes_scalar = bool({int, float} & ({wanted} if get_origin(wanted) is list else {wanted, *get_args(wanted)}))
    for number in outside(limits, number_types(wanted)):
        assert not limits.holds(number)
        for value in [number] * takes_scalar + [[number]] * ("list" in str(wanted)):
            cfg = get_recipe("tiny_dense")
            setattr(getattr(cfg, section), name, value)
            with pytest.raises(ConfigError) as caught:
                cfg.finalize()
            (found,) = [problem for problem in caught.value.problems if problem.fields[0] == f"{section}.{name}"]
            assert found.value == value or math.isnan(number)
            assert found.rule == limits.rule(value)


NO_PATHS = {
    "checkpoint": ("best_metric", "enter_phase"),
    "dataset": ("split", "budgets", "fim_tokens", "fim_prefixes"),
    "dist": ("hardware",),
    "logger": ("wandb_project", "wandb_exp_name", "wandb_entity", "wandb_group", "wandb_tags", "wandb_notes"),
    "model": ("mcore", "mtp_loss_scaling_factor", "mtp_variant", "pipeline_model_parallel_layout", "recompute_modules"),
    "optimizer": ("muon_scale_mode",),
    "scheduler": ("lr_decay_tokens", "lr_warmup_tokens", "lr_wsd_decay_tokens"),
    "train": ("train_tokens", "callbacks"),
}
"""Fields whose text is no path: names, counts, schedules, layouts."""


def holds_text(wanted: Any) -> bool:
    if get_origin(wanted) is Literal:
        return False
    return wanted in (str, Any) or any(holds_text(arg) for arg in get_args(wanted)[get_origin(wanted) is dict :])


TEXTS = [(s, n) for s, n in FIELDS if holds_text(field_types(SECTIONS[s])[n])]
PATHS = [(s, n) for s, n in TEXTS if n not in NO_PATHS.get(s, ())]


def with_text(wanted: Any, text: str) -> Any:
    """A value of a field that holds `text`: a blend for lists, a set of blends for mappings."""
    if "dict" in str(wanted):
        return {"name": [["ok", text], None]}
    return [["ok", text], None] if "list" in str(wanted) else text


def test_every_path_is_declared_as_one():
    assert {(s, n) for s, n in TEXTS if is_path(SECTIONS[s], n)} == set(PATHS)


@pytest.mark.parametrize(("section", "name"), PATHS)
@pytest.mark.parametrize(
    ("text", "words"),
    [("s3://bucket/x", "mounted"), ("HDFS://x", "mounted"), ("a\0b", "NUL"), ("", "must not be empty")],
)
def test_what_is_no_path_of_a_file_system_is_refused(section, name, text, words):
    if text.startswith("s3:") and may_be_address(SECTIONS[section], name):
        text = "s3://"  # names no bucket
        words = "bucket"
    cfg = get_recipe("tiny_dense")
    setattr(getattr(cfg, section), name, with_text(field_types(SECTIONS[section])[name], text))
    with pytest.raises(ConfigError) as caught:
        cfg.finalize()
    assert any(f.fields[0].startswith(f"{section}.{name}") and words in f.rule for f in caught.value.problems)


@pytest.mark.parametrize("text", ["C:/x", "a:b", "x//y", "/a b/ü"])
def test_what_looks_a_little_like_an_address_is_a_path(text):
    cfg = get_recipe("tiny_dense")
    cfg.checkpoint.save = text
    assert cfg.finalize().checkpoint.save == text


@pytest.mark.parametrize(
    "number", [math.nan, math.inf, 2**63, -(10**400), 10**5000], ids=["nan", "inf", "2^63", "-10^400", "10^5000"]
)
@pytest.mark.parametrize(
    ("section", "name", "wrap"),
    [
        ("rng", "seed", lambda number: number),
        ("optimizer", "lr", lambda number: number),
        ("model", "mtp_loss_scaling_factor", lambda number: number),
        ("model", "mtp_depth_weights", lambda number: [number]),
        ("model", "mcore", lambda number: {"softmax_scale": number}),
        ("dist", "hardware", lambda number: {"peaks": {"bf16": number}}),
        ("dataset", "blend", lambda number: [["a"], [number]]),
        ("dataset", "valid_sets", lambda number: {"x": [["a"], [number]]}),
    ],
)
def test_numbers_are_finite_wherever_they_stand(section, name, wrap, number):
    cfg = get_recipe("tiny_dense")
    setattr(getattr(cfg, section), name, wrap(number))
    with pytest.raises(ConfigError) as caught:
        cfg.finalize()
    assert all(problem.fields[0].startswith(f"{section}.{name}") for problem in caught.value.problems)
    json.dumps([problem.as_dict() for problem in caught.value.problems], allow_nan=False)


def test_a_derived_value_is_checked_like_a_given_one():
    cfg = get_recipe("tiny_mla_moe")
    cfg.model.hidden_size = cfg.model.num_attention_heads - 1
    with pytest.raises(ConfigError, match=r"kv_channels = 0: must be at least 1 .*It follows from other fields"):
        cfg.finalize()
    cfg.model.kv_channels = 16
    assert ConfigContainer.from_yaml(cfg.finalize().to_yaml()).finalize() == cfg


@pytest.mark.parametrize(
    "value", [200_000 * "x", ["y" * 100_000], {"z" * 100_000: 1}, 10**5000], ids=["text", "list", "mapping", "integer"]
)
def test_long_values_are_cut_in_messages(value):
    for section, name in (("model", "num_layers"), ("model", "mcore"), ("dataset", "split"), ("optimizer", "lr")):
        cfg = get_recipe("tiny_dense")
        setattr(getattr(cfg, section), name, value)
        with pytest.raises(ConfigError) as caught:
            cfg.finalize()
        assert all(len(line) < 1000 for line in str(caught.value).splitlines())


def test_a_wrong_field_hides_no_problem_of_another_whose_name_begins_with_its_own():
    cfg = get_recipe("tiny_dense")
    cfg.dataset.blend = 7
    cfg.dataset.blend_per_split = [["a"], None]
    with pytest.raises(ConfigError) as caught:
        cfg.finalize()
    assert [problem.fields[0] for problem in caught.value.problems] == ["dataset.blend", "dataset.blend_per_split"]


def test_a_problem_is_left_out_where_one_of_its_fields_is_wrong():
    cfg = get_recipe("tiny_dense")
    cfg.model.update(tensor_model_parallel_size=0, num_attention_heads=-1, num_query_groups=3)
    with pytest.raises(ConfigError) as caught:
        cfg.finalize()
    fields = {problem.fields[0] for problem in caught.value.problems}
    assert fields == {"model.tensor_model_parallel_size", "model.num_attention_heads"}


@pytest.mark.parametrize("layout", ["auto", "even", "(t*10000)*10000"])
def test_absurd_sizes_are_refused_without_being_expanded(layout):
    cfg = get_recipe("tiny_dense")
    cfg.model.update(
        pipeline_model_parallel_size=1000,
        virtual_pipeline_model_parallel_size=1000,
        pipeline_model_parallel_layout=layout,
    )
    with pytest.raises(ConfigError, match=r"no chunk may be empty|more than 100000 symbols"):
        cfg.finalize()


def containers(value: Any) -> Iterator[list | dict]:
    if isinstance(value, list | dict):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


def frozen_config(recipe: str) -> ConfigContainer:
    cfg = get_recipe(recipe)
    cfg.model.mcore["window_size"] = [4, 0]
    cfg.model.mtp_depth_weights = [1.0] * cfg.model.mtp_num_layers
    cfg.dataset.valid_sets = {"code": [["a"], None]}
    return cfg.finalize()


CHANGES = {
    list: ["append(1)", "extend([1])", "insert(0, 1)", "pop()", "remove(1)", "clear()", "sort()", "reverse()"],
    dict: ["update(a=1)", "setdefault('a', 1)", "pop('a')", "popitem()", "clear()"],
}
STATEMENTS = {
    list: ["it[0] = 1", "it[:] = []", "del it[:]", "it += [1]", "it *= 2"],
    dict: ["it['a'] = 1", "del it['a']", "it |= {'a': 1}"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_list_or_dict_of_a_finalized_config_can_change(recipe):
    cfg = frozen_config(recipe)
    before, count = cfg.to_dict(), 0
    for section, name in FIELDS:
        for it in containers(getattr(getattr(cfg, section), name)):
            kind = list if isinstance(it, list) else dict
            for code in [f"it.{call}" for call in CHANGES[kind]] + STATEMENTS[kind]:
                with pytest.raises(ConfigError, match=rf"{section}\.{name} = .*finalized"):
                    exec(code, {"it": it})
                count += 1
    assert count > 50
    assert cfg.to_dict() == before


def test_frozen_lists_and_dicts_behave_as_plain_ones():
    cfg = frozen_config("tiny_mla_moe")
    sets, freq = cfg.dataset.valid_sets, cfg.model.moe_layer_freq
    assert (type(sets), type(freq)) == (FrozenDict, FrozenList)
    assert sets == {"code": [["a"], None]}
    assert freq == [0, 1, 1, 1]
    assert json.loads(json.dumps(sets)) == load_yaml(dump_yaml(sets), "test") == sets
    for plain in (copy.deepcopy(sets), pickle.loads(pickle.dumps(sets)), cfg.copy().dataset.valid_sets):
        plain["code"][0].append("b")
        assert plain == {"code": [["a", "b"], None]}
    assert type(cfg.to_dict()["dataset"]["valid_sets"]["code"]) is list
    assert asdict(cfg) == cfg.to_dict()
    with pytest.raises(ConfigError, match="finalized"):
        pickle.loads(pickle.dumps(cfg)).model.moe_layer_freq.append(1)


def test_files_that_name_a_removed_field_still_open():
    data = yaml.safe_load(ConfigContainer().to_yaml())
    data["logger"]["log_params_norm"] = True
    assert ConfigContainer.from_dict(data) == ConfigContainer()
    with pytest.raises(ConfigError, match=r"logger\.log_params_norm: there is no such field\. It was removed"):
        ConfigContainer().logger.log_params_norm = True


# ---- every field is read by the package ----
IN_CHECKS = {"ddp.use_megatron_fsdp", "ddp.use_torch_fsdp2", "dist.watchdog_s", "dataset.seq_length"}
"""Read by checks only: two exist to be refused by name, one is half of watchdog_timeout_s, one repeats another."""
ALIASES = {
    "checkpoint": {"ckpt"},
    "scheduler": {"sched"},
    "optimizer": {"opt"},
    "validation": {"val"},
    "dataset": {"data"},
}
NOT_READERS = ("sections", "checks", "mcore", "hints.py", "derive.py", "finalize.py")


def fields_read() -> set[str]:
    """Fields that some file outside the declarations and checks of the config reads, as "section.field".

    A read is `<section>.<field>` where the name before the dot is the section's or an alias of it (`cfg.model.x`,
    `model.x`, `ckpt.save`), a name with an annotation or an assignment that says so (`def f(own: LoggerConfig)`,
    `own = cfg.logger`), or a text with the field's name where fields are read by name.
    """
    root = Path(megatron_mtp.__file__).parent
    found: set[str] = {f"model.{name}" for name in mcore_fields(SECTIONS["model"], ("same", "mla", "moe"))}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not (parts[0] == "config" and parts[1] in NOT_READERS):
            found |= reads_of(ast.parse(path.read_text(encoding="utf-8")))
    return found


def reads_of(tree: ast.AST) -> set[str]:
    owners = {alias: section for section in SECTIONS for alias in (section, *ALIASES.get(section, ()))}
    classes = {kind.__name__: section for section, kind in SECTIONS.items()}
    nodes, found = list(ast.walk(tree)), set()
    for node in nodes:
        if isinstance(node, ast.arg | ast.AnnAssign) and ast.unparse(node.annotation or node) in classes:
            owners[last_name(node)] = classes[ast.unparse(node.annotation)]
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            is_pair = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            for name, source in zip(target.elts, value.elts, strict=True) if is_pair else [(target, value)]:
                if isinstance(source, ast.Attribute) and source.attr in SECTIONS:
                    owners[last_name(name)] = source.attr
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and last_name(node.value) in owners:
            found.add(f"{owners[last_name(node.value)]}.{node.attr}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and last_name(node.args[0]) in owners:
            section = owners[last_name(node.args[0])]  # getattr(sched, f"lr_decay_{unit}") reads what begins like that
            prefix = ast.unparse(node.args[1]).strip("f'").partition("{")[0]
            found |= {
                f"{section}.{name}" for name in field_types(SECTIONS[section]) if prefix and name.startswith(prefix)
            }
    return found


def last_name(node: ast.AST) -> str:
    """The name by which an expression or a declaration goes, without the underscore of private ones."""
    if isinstance(node, ast.arg):
        return node.arg
    return ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node).rpartition(".")[2].lstrip("_")


def test_every_field_is_read():
    unread = {f"{section}.{name}" for section, name in FIELDS} - fields_read()
    assert unread == IN_CHECKS, "nothing in the package reads these fields: use them, or remove them"
