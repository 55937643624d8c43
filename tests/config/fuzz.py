"""Hostile and random input for the config and the commands that read one. Every case follows from its number.

python -m tests.config.fuzz FIRST COUNT runs cases under limits of time and memory, and prints those that fail.
"""

from __future__ import annotations

import io
import json
import math
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from megatron_mtp.cli.main import main
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.checks.parallel import minimum_world_size
from megatron_mtp.config.coerce import field_types
from megatron_mtp.config.hints import hints
from megatron_mtp.config.loss_factor import LossFactor
from megatron_mtp.config.mcore_table import MCORE_FIELDS
from megatron_mtp.config.overrides import apply_overrides, apply_yaml
from megatron_mtp.config.sections import section_types
from megatron_mtp.config.yaml_text import dump_inline
from megatron_mtp.errors import MegatronMTPError
from megatron_mtp.parallel.facts import facts
from megatron_mtp.parallel.resolve import resolve
from megatron_mtp.recipes import RECIPES, get_recipe

SECONDS, GIB = 5.0, 2
"""Processor time and memory that a case may take."""
LONGEST_LINE = 3000
"""Characters of a line of a message."""
TINY = [name for name in RECIPES if name.startswith("tiny")]
SECTIONS = section_types()
FIELDS = [(section, name) for section, kind in SECTIONS.items() for name in field_types(kind)]

NUMBERS: list[Any] = [0, 1, 2, 3, 4, 8, 16, 64, 4096, -1, 0.0, 0.1, 0.5, 1.0, 1e-9, 1e9, -2.5]
HUGE: list[Any] = [2**31, 2**32, 2**63, 10**18, 10**30, -(10**400), 10**400, 10**5000, 1e308, 5e-324]
NOT_FINITE = [math.nan, math.inf, -math.inf]
TEXTS = [
    "",
    " ",
    "x",
    "auto",
    "even",
    "10B",
    "1e99",
    "9" * 5000,
    "١٢",
    "0x10",
    "1:30",
    "s3://a/b",
    "a\0b",
    "\ud800",
    "L" * 9000,
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [1, 1],
    [[], None],
    [["a"], [0.5]],
    [["a", 1], [math.nan]],
    {"a": 1},
    (1, 2),
]
OTHERS += [
    {"a": ["b"]},
    {"base": {"base": 7}},
    {"peaks": 7},
    {"a": {"b": [{}]}},
    [[[[[]]]]],
    [None],
    b"x",
    {1},
    object(),
    ConfigContainer,
]
RAW = [
    "!!bool x",
    "!!map [1]",
    "!!int x",
    "&a 1",
    "*a",
    "[",
    "{",
    "[" * 300,
    "{a: " * 25,
    "'",
    "a: b: c",
    "- 1",
    "${x}",
    "? [a] : b",
]
RAW += [
    "null",
    "None",
    "~",
    "true",
    "yes",
    ".nan",
    ".inf",
    "1e400",
    "1_0",
    "007",
    "2001-01-01",
    "<<",
    "=",
    '"a\\0b"',
    "\x07",
    "a\u2028b",
]
RAW += [
    "{a: 1, a: 2}",
    "{[1]: 2}",
    "{1: 2}",
    "{? {a: b} : c}",
    "[1, x]",
    "[5, 6, 6, 4]",
    "[-1, 5]",
    "[[a], [1" + "0" * 400 + "]]",
]
MCORE = [*random.Random(0).sample(sorted(MCORE_FIELDS), 60), "softmax_scale", "fp8", "nothing_like_it", "x" * 9000]

# Choices that often fit together.
GENTLE: dict[str, list[Any]] = {
    "model.num_layers": [4, 6, 8, 11, 12, 24],
    "model.mtp_num_layers": [0, 1, 2, 3],
    "model.mtp_variant": ["sequential", "parallel"],
    "model.mtp_hidden_source": ["post_final_norm", "pre_final_norm"],
    "model.mtp_layer_mlp": [None, "dense"],
    "model.pipeline_model_parallel_size": [1, 2, 3, 4],
    "model.virtual_pipeline_model_parallel_size": [None, 1, 2, 3],
    "model.pipeline_model_parallel_layout": ["auto", "auto", "even"],
    "model.tensor_model_parallel_size": [1, 2],
    "model.sequence_parallel": [True, False],
    "model.context_parallel_size": [1, 2],
    "model.expert_model_parallel_size": [1, 2],
    "model.moe_layer_freq": [1, 2],
    "model.recompute_granularity": [None, "selective"],
    "model.vocab_size": [512, 1000],
    "model.seq_length": [64, 128],
    "train.global_batch_size": [8, 12, 24, 48, 3072],
    "train.micro_batch_size": [1, 2],
    "train.rampup_batch_size": [None, [4, 4, 100]],
    "train.train_iters": [10, 1000],
    "scheduler.lr_decay_style": ["constant", "linear", "cosine"],
    "precision.dtype": ["fp32", "bf16", "fp16"],
    "ddp.overlap_grad_reduce": [True, False],
    "dist.hardware": ["cpu", "h100", {"base": "a100", "memory_gib": 20}],
    "validation.eval_iters": [0, 2],
    "optimizer.optimizer": ["adam", "sgd", "adam", "muon"],
}


class TooSlowError(BaseException):
    """A case took more than SECONDS of processor time."""


def fitting(rng: random.Random, wanted: Any) -> Any:
    """A value of a field's type, mostly."""
    args = get_args(wanted)
    if get_origin(wanted) is Literal:
        return rng.choice(args)
    if args and get_origin(wanted) not in (list, dict):
        return fitting(rng, rng.choice(args))
    if wanted is bool:
        return rng.random() < 0.5
    if wanted in (int, float):
        return rng.choice(NUMBERS)
    if wanted is type(None):
        return None
    if get_origin(wanted) is list:
        return [fitting(rng, args[0]) for _ in range(rng.randrange(4))]
    if get_origin(wanted) is dict:
        return {rng.choice(MCORE): rng.choice(NUMBERS) for _ in range(rng.randrange(3))}
    return rng.choice([*TEXTS, layout_text(rng), factor_text(rng)])


def hostile(rng: random.Random) -> Any:
    return rng.choice(rng.choice([NUMBERS, HUGE, NOT_FINITE, TEXTS, OTHERS]))


def text_of(rng: random.Random, value: Any) -> str:
    """A value as a user might write it."""
    if rng.random() < 0.3:
        return rng.choice(RAW)
    try:
        return dump_inline(value) if rng.random() < 0.7 else str(value)
    except Exception:  # what YAML cannot write
        return ascii(type(value))


def layout_text(rng: random.Random) -> str:
    if rng.random() < 0.4:
        stages = ["t" * rng.randrange(1, 5) for _ in range(rng.randrange(1, 6))]
        return "E" + "|".join(stages) + rng.choice(["L", "mL", "|mL", "mmL", ""])
    parts = [
        "E",
        "t",
        "t",
        "m",
        "L",
        "|",
        ",",
        "(",
        ")",
        "*2",
        "*3",
        "*10000",
        "*99999999",
        "(t|)*3",
        "x",
        " ",
        "*٣",
        "t*" + "9" * 5000,
    ]
    return "".join(rng.choices(parts, k=rng.randrange(1, 14)))


def factor_text(rng: random.Random) -> str:
    parts = [
        "0.3",
        "0.1",
        "1e400",
        "-1",
        "nan",
        "@0",
        "@10B",
        "@1e99T",
        ",",
        "linear:",
        "->",
        "@",
        "٣",
        " ",
        "1" * 400,
        "1_0",
    ]
    good = ["0.3@0,0.1@10B", "linear:0.3->0.1@1T", "0.1", "0.3@0,0.2@5,0.1@10"]
    return rng.choice(good) if rng.random() < 0.2 else "".join(rng.choices(parts, k=rng.randrange(1, 8)))


def random_changes(rng: random.Random, count: int) -> dict[tuple[str, str], Any]:
    names = rng.sample(FIELDS, count)
    return {(s, n): hostile(rng) if rng.random() < 0.4 else fitting(rng, field_types(SECTIONS[s])[n]) for s, n in names}


def gentle_changes(rng: random.Random) -> dict[tuple[str, str], Any]:
    names = rng.sample(sorted(GENTLE), rng.randrange(1, 9))
    changes = {tuple(name.split(".")): rng.choice(GENTLE[name]) for name in names}
    if rng.random() < 0.2:
        changes["model", "pipeline_model_parallel_layout"] = layout_text(rng)
    return changes  # type: ignore[return-value]


def as_arguments(rng: random.Random, changes: dict[tuple[str, str], Any], is_exact: bool) -> list[str]:
    lines = [f"{s}.{n}={dump_inline(v) if is_exact else text_of(rng, v)}" for (s, n), v in changes.items()]
    if not is_exact and rng.random() < 0.2:
        lines.append(
            rng.choice(["", "=", "model", "model=1", "a.b.c=d", "model.mcore.fp8=1", ".=x", "num_layers=2", "x" * 9000])
        )
    return lines


def change(rng: random.Random, cfg: ConfigContainer, changes: dict[tuple[str, str], Any], is_exact: bool) -> None:
    """Through Python, the command line or a file."""
    channel = rng.randrange(3)
    if channel == 0:
        for (section, name), value in changes.items():
            setattr(getattr(cfg, section), name, value)
    elif channel == 1:
        apply_overrides(cfg, as_arguments(rng, changes, is_exact))
    else:
        lines: dict[str, list[str]] = {}
        for (section, name), value in changes.items():
            lines.setdefault(section, []).append(
                f"  {name}: {dump_inline(value) if is_exact else text_of(rng, value)}\n"
            )
        text = "".join(f"{section}:\n{''.join(rows)}" for section, rows in lines.items())
        if not is_exact and rng.random() < 0.2:
            cut = rng.randrange(len(text) + 1)
            text = text[:cut] + rng.choice(RAW) + text[cut:]
        path = Path(tempfile.gettempdir()) / f"fuzz_{resource.getpagesize()}_{id(cfg)}.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            apply_yaml(cfg, path)
        finally:
            path.unlink()


def check_accepted(rng: random.Random, cfg: ConfigContainer, world_size: int | None) -> None:
    """A config that was accepted is shown, resolved and, as this takes longest, often read back."""
    again = ConfigContainer.from_yaml(cfg.to_yaml()) if rng.random() < 0.4 else cfg.copy()
    assert again == cfg, "the YAML of a config reads as another one"
    assert again.finalize(world_size) == cfg, "a second finalize differs"
    json.dumps([facts(cfg), hints(cfg), cfg.to_dict()], allow_nan=False)
    resolve(cfg, world_size)


def one_field(rng: random.Random) -> None:
    _changed(rng, random_changes(rng, 1), is_exact=False)


def many_fields(rng: random.Random) -> None:
    _changed(rng, random_changes(rng, rng.randrange(2, 8)), is_exact=False)


def gentle(rng: random.Random) -> None:
    _changed(rng, gentle_changes(rng), is_exact=True)


def _changed(rng: random.Random, changes: dict[tuple[str, str], Any], is_exact: bool) -> None:
    cfg = get_recipe(rng.choice(TINY if rng.random() < 0.95 else list(RECIPES)))
    change(rng, cfg, changes, is_exact)
    world_size = None
    if is_exact and rng.random() < 0.5:
        world_size = minimum_world_size(cfg.model) * rng.choice([1, 1, 2])
    elif not is_exact and rng.random() < 0.3:
        world_size = rng.choice([1, 2, 4, 8, 0, -1, 7, 10**9, 10**400])
    cfg.finalize(world_size)
    check_accepted(rng, cfg, world_size)


def layouts(rng: random.Random) -> None:
    cfg = get_recipe("tiny_dense")
    cfg.model.update(num_layers=rng.randrange(1, 12), mtp_num_layers=rng.randrange(3))
    cfg.model.update(pipeline_model_parallel_size=rng.randrange(1, 5))
    cfg.model.pipeline_model_parallel_layout = layout_text(rng)
    cfg.finalize()
    check_accepted(rng, cfg, None)


def factors(rng: random.Random) -> None:
    factor = LossFactor.parse(factor_text(rng))
    low, high = factor.extremes
    assert all(low <= factor.at(tokens) <= high for tokens in (0, 1, 10**9, 10**18))


def commands(rng: random.Random) -> None:
    """A command line in this process: exit code 0 or 2, no traceback, --json that any reader accepts."""
    is_exact = rng.random() < 0.6
    changes = gentle_changes(rng) if is_exact else random_changes(rng, rng.randrange(3))
    command = rng.choice(["show", "show", "plan", "verify"])
    recipe = rng.choice(TINY) if rng.random() < 0.9 else rng.choice([*RECIPES, "tiny_dens", "", "x" * 9000])
    line = [command, recipe, *(text for text in as_arguments(rng, changes, is_exact) if not text.startswith("-"))]
    options: dict[str, list[list[str]]] = {
        "show": [["--diff"], ["--world-size", rng.choice(["0", "-5", "8", "9" * 5000, "x"])], ["--config", "absent\0"]],
        "plan": [
            ["--devices", rng.choice(["1", "2", "8", "-1", "9" * 400])],
            ["--hardware", rng.choice(["h100", "cpu", "h10", "", "9" * 9000])],
            ["--memory", rng.choice(["0", "1e-9", "80", "nan", "inf", "-1"])],
            ["--compare", rng.choice(["5,6", "--5", "²", "9" * 5000, layout_text(rng)])],
            ["--top", "3"],
        ],
        "verify": [
            ["--layouts", rng.choice(["tp=2", "pp=2,vp=2", "tp=" + "9" * 5000, "tp=٢", "x=1", layout_text(rng)])]
        ],
    }
    for option in options[command]:
        line += option if rng.random() < 0.25 else []
    line += ["--json"] if rng.random() < 0.3 else []
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(line)
        except SystemExit as end:
            code = end.code or 0
    assert code in (0, 2), f"exit code {code}: {err.getvalue()[-500:]}"
    assert "Traceback" not in err.getvalue()
    longest = max(map(len, err.getvalue().splitlines() or [""]))
    assert longest < LONGEST_LINE or any(len(text) > LONGEST_LINE for text in line[:2]), (
        f"a line of {longest} characters"
    )
    if "--json" in line and out.getvalue():
        json.loads(out.getvalue(), parse_constant=lambda name: _fail(f"{name} is no JSON"))


def _fail(text: str) -> None:
    raise AssertionError(text)


KINDS: list[Callable[[random.Random], None]] = [one_field] * 6 + [many_fields] * 6 + [gentle] * 3 + [layouts] * 3
KINDS += [factors] * 3 + [commands] * 2


def run_case(number: int) -> str | None:
    """What is wrong with a case; None: it ended as it should, and in time."""
    rng = random.Random(number)
    kind = rng.choice(KINDS)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        kind(rng)
    except MegatronMTPError as error:
        longest = max(map(len, str(error).splitlines() or [""]))
        return None if longest < LONGEST_LINE else f"{number} {kind.__name__}: a message of {longest} characters"
    except (Exception, TooSlowError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = next(
            (f for f in reversed(traceback.extract_tb(error.__traceback__)) if "megatron_mtp" in f.filename), frame
        )
        where = f"{place.filename}:{place.lineno}, {frame.filename}:{frame.lineno}"
        return f"{number} {kind.__name__}: {type(error).__name__} {str(error)[:300]} ({where})"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return None


def _too_slow(*_: Any) -> None:
    raise TooSlowError(f"more than {SECONDS} s")


def _run(first: int, count: int) -> None:
    import megatron_mtp.verify.run

    megatron_mtp.verify.run.verify = lambda comparison, report: []  # plan the comparison, start no process
    resource.setrlimit(resource.RLIMIT_DATA, (GIB * 2**30,) * 2)
    signal.signal(signal.SIGVTALRM, _too_slow)
    for number in range(first, first + count):
        if found := run_case(number):
            print(found.encode("ascii", "backslashreplace").decode(), flush=True)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if peak_gib > GIB:
        print(f"cases {first} to {first + count - 1} took {peak_gib:.1f} GiB", flush=True)


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]))
