"""Profile files: whatever a file holds, `plan --profile` plans with it or says what is wrong."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_mtp.config.machines import find_machine
from megatron_mtp.errors import PlanError
from megatron_mtp.parallel.planner.cost import estimate_costs
from megatron_mtp.parallel.planner.part_costs import VERSION, Profile, measured_fields
from megatron_mtp.parallel.shape import RunShape
from megatron_mtp.plan.compare import make_plans
from megatron_mtp.plan.report import as_data, as_text
from megatron_mtp.recipes import get_recipe

pytestmark = pytest.mark.unit


def config():
    cfg = get_recipe("tiny_mla_moe")
    cfg.model.pipeline_model_parallel_size = 2
    return cfg


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a profile as it is written."""
    cfg = config().finalize(2)
    costs = estimate_costs(RunShape.of(cfg, 2), find_machine("cpu"))
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    Profile(
        version=VERSION, costs=costs, model=measured_fields(cfg.model), dtype=cfg.precision.dtype,
        micro_batch_size=cfg.train.micro_batch_size, device="cpu", notes={"steps": 7},
    ).write(path)  # fmt: skip
    return path.read_text()


def plan_with(path: Path) -> dict[str, Any]:
    plans = make_plans(config(), devices=2, profile_path=path)
    as_text("tiny_mla_moe", plans)
    return as_data("tiny_mla_moe", plans)


def test_a_sound_file_is_read_as_it_was_written_and_planned_with(sound: str, tmp_path: Path):
    path, again = tmp_path / "profile.json", tmp_path / "again.json"
    path.write_text(sound)
    Profile.read(path).write(again)
    assert again.read_text() == sound
    assert plan_with(path)["profile"] == "cpu"


def spots(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below `data`."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, dict | list):
            yield from spots(value)


BAD = [
    None, True, "", "x", "1.5", [], {}, [1.0], {"forward_ms": 1.0}, 0, -1, 0.0, -0.5, -1e9, 1e-320, 1e308,
    math.nan, math.inf, -math.inf, 10**400, -(2**64), 1.5,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_no_damage_raises_anything_but_a_message_for_the_user(sound: str, tmp_path: Path, seed: int):
    rng, path, refused, planned = random.Random(seed), tmp_path / "profile.json", 0, 0
    for _ in range(20):
        data = json.loads(sound)
        for _ in range(rng.choice((1, 1, 2))):
            container, key = rng.choice(list(spots(data)))
            if rng.random() < 0.15:
                del container[key]
            elif rng.random() < 0.1:
                container[key] = json.loads("[" * 900 + "]" * 900)
            else:
                container[key] = rng.choice(BAD)
        text = json.dumps(data)
        path.write_text(text[: rng.randrange(len(text))] if rng.random() < 0.05 else text)
        try:
            plans = plan_with(path)
        except PlanError as error:
            refused += str(error).startswith("--profile")
        else:
            planned += 1
            step_ms = json.loads(json.dumps(plans, allow_nan=False))["plan"]["step_ms"]
            assert 0 < step_ms < math.inf
    assert refused + planned == 20
    assert refused > 5


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("costs", "head", "forward_ms"), "", "costs.head.forward_ms = '': must be a number."),
        (("costs", "head", "forward_ms"), math.nan, "costs.head.forward_ms = nan: must be finite"),
        (("costs", "step_ms"), -1e9, "costs.step_ms = -1000000000.0: must be at least 0"),
        (("costs", "head"), {}, "costs.head.backward_ms: is missing."),
        (("costs", "mtp_head"), 0, "costs.mtp_head = 0: must be a mapping"),
        (("costs", "pipeline_link", "gb_per_s"), 0, "costs.pipeline_link.gb_per_s = 0: must be at least 1e-06"),
        (("costs", "data_link", "latency_ms"), 10**400, "costs.data_link.latency_ms = 1"),
        (("costs", "layer"), {}, "it holds no time above 1e-06 ms of layers of kind dense and moe"),
        (("costs", "layer"), [], "costs.layer = []: must be a mapping"),
        (("costs", "laier"), {}, "costs.laier: there is no such field. Did you mean layer?"),
        (("device",), 0, "device = 0: must be text."),
        (("model",), "", "model = '': must be a mapping"),
        (("dtype",), "bf15", "dtype = 'bf15': must be one of"),
        (("micro_batch_size",), 0, "micro_batch_size = 0: must be at least 1"),
        (("version",), 99, "written by another version"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_the_message_names_file_entry_value_and_rule(sound: str, tmp_path: Path, path, value, said):
    data = json.loads(sound)
    container = data
    for key in path[:-1]:
        container = container[key]
    container[path[-1]] = value
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        plan_with(file)
    assert said in str(caught.value)
    assert "megatron-mtp profile" in str(caught.value)


def test_every_mistake_of_a_file_is_named_at_once(sound: str, tmp_path: Path):
    data = json.loads(sound)
    del data["device"], data["costs"]["head"]
    data["costs"]["step_ms"] = "x"
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        Profile.read(file)
    assert {problem.fields[0] for problem in caught.value.problems} == {"device", "costs.head", "costs.step_ms"}
    assert {problem.where for problem in caught.value.problems} == {f"--profile {str(file)!r}"}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\0", "nul", '"x"', "1" * 5000])
def test_a_text_that_is_no_profile_is_refused(tmp_path: Path, text: str):
    file = tmp_path / "profile.json"
    file.write_text(text)
    with pytest.raises(PlanError, match="megatron-mtp profile"):
        Profile.read(file)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    file = tmp_path / "profile.json"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="is not JSON"):
        Profile.read(file)
