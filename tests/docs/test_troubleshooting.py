"""docs/troubleshooting.md is what the program's table says, and the table is what the program prints."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from megatron_mtp import errors
from megatron_mtp.config import ConfigContainer
from megatron_mtp.errors import MegatronMTPError
from megatron_mtp.observe.health import HealthMonitor
from megatron_mtp.observe.signs import built_in_signs, signs_after_warmup
from megatron_mtp.observe.troubles import ERRORS, EXIT_CODES, FAULTS, SIGNS, WARNINGS, Trouble
from megatron_mtp.training.callbacks.stragglers import StragglerReport
from megatron_mtp.training.guards import watchdog
from scripts.troubleshooting_doc import render

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_mtp"
QUIET = {"cli", "launch", "doctor"}
"""Packages whose warnings are not of a run."""


def texts(path: Path) -> list[str]:
    """The text of every string of a file; {} stands for what an f-string puts in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [text for node in ast.walk(tree) if (text := text_of(node)) is not None]


def text_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp):
        sides = text_of(node.left), text_of(node.right)
        return None if None in sides else "".join(sides)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def is_printed(trouble: Trouble) -> bool:
    """Whether every part of the message stands in the strings of its file; names of fields and depths are put in."""
    found = " ".join(texts(PACKAGE / trouble.source))
    found = re.sub(r"\{\}|%\w|%\.0f", " ", found)
    parts = re.split(r"\.\.\.|mtp_k loss|train\.on_nan = \w+", trouble.shown)
    words = [part.strip(" :,;") for part in parts]
    squeezed = re.sub(r"\s+", " ", found)
    return all(re.sub(r"\s+", " ", word) in squeezed for word in words if word)


def test_the_page_is_generated():
    assert (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8") == render()


@pytest.mark.parametrize("trouble", [*SIGNS.values(), *FAULTS, *ERRORS, *WARNINGS], ids=lambda one: one.shown[:40])
def test_each_message_of_the_table_is_printed_where_it_says(trouble: Trouble):
    assert is_printed(trouble)


def test_a_message_that_nobody_prints_is_found():
    assert not is_printed(Trouble("the gap of mtp_k loss is fine", "observe/health.py", "", ""))


def test_every_sign_has_its_row():
    found = {*built_in_signs(1), *signs_after_warmup(100, 0), *StragglerReport(1.5).health_signs()}
    monitor = HealthMonitor()
    for step in range(1, 201):  # the signs that every monitor has
        found |= {event.sign for event in monitor.check(step, {"lm loss": 5 - step / 50 + 3 * (step % 9 == 0)})}
        if step % 20 == 0:
            found |= {event.sign for event in monitor.check_evaluation("x", step, {"lm loss": step / 100})}
    found |= {event.sign for event in monitor.check(201, {"lm loss": float("nan")})}
    assert {name.split(":")[0] for name in found} == set(SIGNS)


def test_every_exit_code_has_its_row():
    classes = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, MegatronMTPError)]
    codes = {one.exit_code for one in classes} | {watchdog.EXIT_CODE, ConfigContainer().dist.preempted_exit_code}
    assert codes | {0, 1, 137, 143} == set(EXIT_CODES)
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page[page.index("## Exit codes") : page.index("## Signals")]
    assert {int(code) for code in re.findall(r"^\| (\d+)", table, re.M)} == set(EXIT_CODES)


def test_every_warning_of_a_run_has_its_row():
    known = [(one.source, re.split(r"\.\.\.", one.shown)[0].strip(" :")) for one in WARNINGS]
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.relative_to(PACKAGE).as_posix()
        if source.split("/")[0] in QUIET:
            continue
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
            if not is_call or call.func.attr not in ("warning", "error", "exception"):
                continue
            if not (isinstance(call.func.value, ast.Name) and call.func.value.id in ("logger", "log")):
                continue
            text = text_of(call.args[0]) or ""
            # "%s" alone hands on a message that was made elsewhere; a name stands for a text of its file.
            if re.sub(r"%\w|iteration|[:\s]", "", text) and not any(
                source == where and words in re.sub(r"%\.?\d*\w", "", text) for where, words in known
            ):
                missing.append(f"{source}: {text}")
    assert not missing
