"""`megatron-mtp plan`: what it finds for published models, what it says of mistakes, what it writes."""

from __future__ import annotations

import json
import time

import pytest

from megatron_mtp.config.machines import find_machine
from megatron_mtp.parallel.planner.search_sizes import _Search
from megatron_mtp.plan.compare import make_plans
from megatron_mtp.recipes import get_recipe
from tests.harness.cpu_time import is_quick
from tests.harness.plan_command import run as run

pytestmark = pytest.mark.unit

FULL = ("model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1")
DEEPSEEK_16 = ",".join(["4"] * 15 + ["1"])


def plan(run, *arguments: str) -> dict:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize(
    ("arguments", "published"),
    [
        (["deepseek_v3"], [DEEPSEEK_16]),
        (
            [
                "deepseek_v3",
                "--devices",
                "256",
                "model.pipeline_model_parallel_size=8",
                "model.expert_model_parallel_size=32",
                *FULL,
            ],
            ["8,8,8,8,8,8,8,5"],
        ),
        (
            [
                *("deepseek_v3", "--devices", "1024", "model.pipeline_model_parallel_size=8"),
                *("model.virtual_pipeline_model_parallel_size=4", *FULL),
            ],
            ["Et|(tt|)*30mL", "Et*3|(tt|)*29m|L"],
        ),
        (["kimi_k2", "--memory", "0", "model.mtp_num_layers=0"], [DEEPSEEK_16]),
    ],
    ids=["deepseek_v3 16x1", "deepseek_v3 8x1", "deepseek_v3 8x4", "kimi_k2 16x1"],
)
def test_it_is_no_slower_than_published_layouts(run, arguments, published):
    data = plan(run, *arguments, *(text for name in published for text in ("--compare", name)))
    for name in published:
        assert data["plan"]["step_ms"] <= data["compare"][name]["step_ms"] * (1 + 1e-9)
    assert data["gap"] <= 0.02


def test_it_finds_the_published_layout_under_the_memory_of_its_device(run):
    data = plan(run, "deepseek_v3")
    assert data["plan"]["layout"] == "E" + "|".join(["tttt"] * 15 + ["tmL"])
    assert data["plan"]["peak_bytes"] <= data["memory_limit_bytes"]
    assert len(data["plan"]["stages"]) == 16
    assert data["plan"]["step_ms"] < data["compare"]["even"]["step_ms"]


def test_the_only_legal_layout(run):
    data = plan(run, "deepseek_v3", "model.virtual_pipeline_model_parallel_size=4", "--memory", "0")
    assert data["plan"]["layout"] == "|".join(["E", *["t"] * 61, "m", "L"])
    assert data["gap"] == 0


def test_a_given_layout_is_planned_as_it_is(run):
    code, out, _ = run("demo", "--hardware", "cpu")
    assert code == 0
    assert "layout: Ettttttt|tttmmL" in out
    assert "The layout is the config's" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["deepseek_v3", "--compare", "5,6,6,4"], ["has 4 entries", "each of the 16 chunks"]),
        (["deepseek_v3", "model.pipeline_model_parallel_layout=Et*61mL"], ["does not divide", "Write 16 chunks"]),
        (["tiny_dense", "model.pipeline_model_parallel_size=16"], ["no stage may be empty", "size=6"]),
        (
            ["deepseek_v3", "model.mtp_num_layers=0", "model.virtual_pipeline_model_parallel_size=4"],
            ["there are 64", "model.virtual_pipeline_model_parallel_size=3"],
        ),
        (["deepseek_v3", "--devices", "1000"], ["world_size = 1000", "multiple of 1024"]),
        (
            [
                "deepseek_v3",
                "--devices",
                "256",
                "model.pipeline_model_parallel_size=8",
                "model.expert_model_parallel_size=32",
            ],
            ["fits the memory of 74.8 GiB", "Nearest that fits: model.recompute_granularity=full"],
        ),
        (["deepseek_v3", "--search", "--devices", "16"], ["no sizes fit", "Use more devices"]),
        (["deepseek_v3", "--search"], ["needs --devices"]),
        (["llama3_8b", "--assume", "fp8=mxfp8", "--write", "plan.yaml"], ["--write: writes a config to train with"]),
        (["llama3_8b", "--assume", "fp8=mxfp8", "--hardware", "a100"], ["a100 has no units for it"]),
        (["llama3_8b", "--assume", "fp9=mxfp8"], ["must be name=value with one of", "Did you mean fp8?"]),
        (
            ["tiny_dense", "--search", "--devices", "97"],
            ["global_batch_size = 8 evenly", "Nearest that works: --devices"],
        ),
        (["tiny_dense", "--devices", "0"], ["greater than or equal to 1"]),
        (["llama3_8b", "--devices", "3"], ["world_size = 3", "multiple of 4"]),
        (["demo", "--hardware", "cpu", "--compare", "5,6"], ["places 11 decoder layers", "model.num_layers = 10"]),
        (["demo", "--hardware", "cpu", "--compare", "5,-1"], ["a negative number"]),
        (["demo", "--hardware", "cpu", "--compare", "7,x"], ["unknown symbol", "the symbols are E"]),
        (["demo", "--hardware", "cpu", "--compare", "--5"], ["--compare = '--5': must be numbers of decoder layers"]),
        (["demo", "--hardware", "cpu", "--compare", "²"], ["--compare = '²': unknown symbol '²'"]),
        (["demo", "--hardware", "cpu", "--compare", "٧,٣"], ["unknown symbol '٣'"]),
        (
            ["demo", "--hardware", "cpu", "--compare", f"{'9' * 4300},{'9' * 4300}"],
            ["must be numbers of decoder layers"],
        ),
        (["demo", "--hardware", "cpu", "--compare", f"Et*{'9' * 5000}"], ["repeated more than 10000 times"]),
        (["demo", "--picture", "schedule.png"], ["the picture is SVG", "--picture 'schedule.svg'"]),
        (["demo", "--hardware", "cpu", "--write", "."], ["--write = '.': cannot be written", "Name another file"]),
        (["deepseek_v3", "--hardware", "h1000"], ["--hardware = 'h1000'", "Did you mean h100"]),
        (["deepseek_v3", "dist.hardware=h1000"], ["dist.hardware = 'h1000'", "Did you mean h100"]),
        (
            ["deepseek_v3", "--profile", "absent.json"],
            ["--profile 'absent.json': it cannot be read", "megatron-mtp profile"],
        ),
        (
            ["tiny_dense", "--hardware", "l40s", "precision.dtype=fp16", "--write", "/absent/plan.yaml"],
            ["cannot be written"],
        ),
    ],
)
def test_mistakes_name_the_rule_and_what_works(run, arguments, words):
    code, _, err = run(*arguments)
    assert code == 2
    for word in words:
        assert word in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("torch", "not JSON"),
        ("[]", "must be a mapping"),
        ('{"costs": {}, "version": 1}', "micro_batch_size: is missing"),
        ('{"version": 0, "costs": 0, "model": 0, "dtype": 0, "micro_batch_size": 0, "device": 0}', "another version"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(run, tmp_path, text, word):
    path = tmp_path / "profile.json"
    path.write_text(text)
    code, _, err = run("demo", "--profile", str(path))
    assert code == 2
    assert word in err
    assert "megatron-mtp profile" in err


def test_a_search_needs_no_micro_batch_that_divides(run):
    data = plan(
        run, "demo", "--hardware", "cpu", "--search", "--devices", "1", "train.global_batch_size=7", "--top", "1"
    )
    assert data["search"][0]["micro_batch_size"] == 1


def test_search_ranks_what_fits(run):
    data = plan(run, "qwen3_600m", "--search", "--devices", "4", "--top", "3")
    times = [found["plan"]["step_ms"] for found in data["search"]]
    assert times == sorted(times)
    assert len(times) == 3
    assert all(found["plan"]["peak_bytes"] <= data["memory_limit_bytes"] for found in data["search"])
    assert data["plan"]["step_ms"] <= times[0] * (1 + 1e-9)


def test_the_overlay_and_the_picture_are_written(run, tmp_path):
    overlay, picture = tmp_path / "plan.yaml", tmp_path / "plan.svg"
    arguments = ["tiny_dense", "model.num_layers=8", "model.pipeline_model_parallel_size=2", "--hardware", "cpu"]
    data = plan(run, *arguments, "--write", str(overlay), "--picture", str(picture))
    code, out, _ = run("tiny_dense", "model.num_layers=8", "--config", str(overlay), "--hardware", "cpu", "--json")
    assert code == 0
    assert json.loads(out)["plan"]["layout"] == data["plan"]["layout"]
    text = picture.read_text()
    assert text.startswith("<svg")
    for colour in ("#4c86c6", "#9fc46b", "#e8963c", "#c2477f"):
        assert colour in text


def test_it_is_quick_and_imports_no_torch():
    """For a given layout."""
    arguments = ["plan", "deepseek_v3", "model.pipeline_model_parallel_layout=Et*4|(t*4|)*14tmL"]
    code = (
        f"import sys\nfrom megatron_mtp.cli.main import main\ntry:\n    main({arguments!r})\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'megatron', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    assert is_quick("-c", code)


@pytest.mark.parametrize("devices", [1_000_003, 2**30, 10**30])
@pytest.mark.parametrize("recipe", ["tiny_dense", "deepseek_v3"])
def test_a_search_refuses_a_number_that_divides_nothing_at_once(run, recipe, devices):
    before = time.process_time()
    code, _, err = run(recipe, "--search", "--devices", str(devices))
    assert code == 2
    assert "no parallel sizes divide" in err
    assert time.process_time() - before < 5


def test_the_numbers_that_a_search_offers_are_the_nearest_that_work(run):
    """Compared with trying all numbers."""
    cfg = get_recipe("tiny_dense").finalize()
    cfg = cfg.copy()
    cfg.train.global_batch_size = 12
    machine = find_machine("h100")
    works = [n for n in range(1, 400) if next(_Search(cfg, machine, n, None).combinations(), None) is not None]
    assert 10 < len(works) < 390
    for devices in set(range(1, 350)) - set(works):
        remedy = _Search(cfg, machine, devices, None).nothing_fits().remedy
        near = (max(n for n in works if n < devices), min((n for n in works if n > devices), default=None))
        offered = " or ".join(str(number) for number in near if number is not None)
        assert remedy == f"Nearest that works: --devices {offered}."


def test_a_search_may_assume_what_the_trainer_lacks(run):
    arguments = ("tiny_dense", "--search", "--devices", "2", "--top", "1", "--hardware", "b200")
    half, fp8 = plan(run, *arguments), plan(run, *arguments, "--assume", "fp8=mxfp8")
    assert fp8["assume"]["fp8"] == "mxfp8"
    assert fp8["plan"]["step_ms"] != half["plan"]["step_ms"]
    assert "assuming fp8=mxfp8" in run("llama3_8b", "--assume", "fp8=mxfp8", "--memory", "0")[1]


def test_a_search_says_what_it_does():
    said = []
    make_plans(get_recipe("tiny_dense"), 2, "cpu", search=True, top=2, report=said.append)
    assert said[0].startswith("planning combination 1 of at most 40: TP ")
    assert any("fastest so far" in line for line in said)


@pytest.mark.parametrize(
    ("arguments", "fields", "value"),
    [
        (["tiny_dense", "--hardware", "h1000"], ["--hardware"], "h1000"),
        (["tiny_dense", "dist.hardware={base: h100, node_size: 0}"], ["dist.hardware.node_size"], 0),
        (["demo", "--hardware", "cpu", "--compare", "7,x"], ["--compare"], "7,x"),
        (["tiny_dense", "--search", "--devices", "97"], ["--devices", "train.global_batch_size"], 97),
        (
            ["deepseek_v3", "--devices", "256", "model.pipeline_model_parallel_size=8",
             "model.expert_model_parallel_size=32"],
            ["model.num_layers", "model.pipeline_model_parallel_size", "model.virtual_pipeline_model_parallel_size"],
            61,
        ),
    ],
)  # fmt: skip
def test_a_plan_that_fails_names_field_value_and_rule_in_json(run, arguments, fields, value):
    code, out, _ = run(*arguments, "--json")
    assert code == 2
    (problem,) = json.loads(out)["problems"]
    assert problem["fields"] == fields
    assert problem["value"] == value
    assert problem["rule"]
    assert problem["remedy"] or arguments[-1] in ("7,x", "dist.hardware={base: h100, node_size: 0}")
