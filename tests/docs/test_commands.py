"""Every command of README and docs, taken from the text, runs as far as it can without a GPU and a cluster.

Its own parser reads it. A config is checked for the size of the job. `show`, `recipes` and `plan` run; `launch` renders
the job; `verify` plans its layouts. A `$ command` of a block must print what stands below it.
"""

from __future__ import annotations

import argparse
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import typer
from markdown_it import MarkdownIt
from torch.distributed.run import parse_args as parse_torchrun

import megatron_mtp.verify.run
from megatron_mtp.cli.choose import choose_config
from megatron_mtp.cli.main import COMMANDS, build_app, main
from megatron_mtp.config.checks.parallel import minimum_world_size
from megatron_mtp.examples.new_project import new_project

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
# The lab log says what was run on a day.
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "CONTRIBUTING.md"]
PAGES.remove(ROOT / "docs" / "lab_log.md")
PROGRAMS = ("megatron-mtp ", "python ", "torchrun ", "make ", ".venv/bin/")
MENTION = re.compile(r"megatron-mtp [\w-]+|python -m megatron_mtp\.[\w.]+")
"""In a sentence these name a program; they are not meant to be typed."""
FILES = ("--write", "--picture", "--config", "--patch", "--script")
"""Options before a file that a command writes, or that its page shows."""
WHOLE = ("show", "recipes", "plan", "launch", "verify")


def commands(text: str) -> list[tuple[str, str | None]]:
    """The commands of a page, each with the output that the page shows for it."""
    found = []
    for token in MarkdownIt().enable("table").parse(text):
        if token.type == "fence" and token.info == "bash":
            found += [(line, None) for line in script(token.content)]
        elif token.type == "fence" and token.content.startswith("$ "):
            line, _, output = token.content.removeprefix("$ ").partition("\n")
            found.append((line, output))
        codes = [child.content.split(" > ")[0] for child in token.children or () if child.type == "code_inline"]
        found += [(code, None) for code in codes if code.startswith(PROGRAMS) and not MENTION.fullmatch(code)]
    return found


def script(text: str) -> list[str]:
    """The lines of a script without comments, joined at backslashes; variables that it sets are put in."""
    variables: dict[str, str] = {}
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        if setting := re.fullmatch(r'([A-Z]+)="(.*)"', line):
            variables[setting[1]] = setting[2]
            continue
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        if words := shlex.split(line, comments=True):
            lines.append(shlex.join(words))
    return lines


CASES = [
    pytest.param(
        page,
        line,
        output,
        id=f"{page.stem}-{number}-{'_'.join(line.split()[:3])}",
        marks=[pytest.mark.slow] if "--search" in line else [],
    )
    for page in PAGES
    for number, (line, output) in enumerate(commands(page.read_text(encoding="utf-8")))
]


def check(words: list[str]) -> None:
    """Runs a command as far as it goes here."""
    match words:
        case ["megatron-mtp", *rest] | ["python", "-m", "megatron_mtp", *rest]:
            check_ours(rest)
        case ["torchrun", *rest] | ["python", "-m", "megatron_mtp.launch.agent", *rest]:
            job = parse_torchrun(rest)
            assert job.module
            assert job.training_script == "megatron_mtp"
            check_ours(job.training_script_args, int(job.nnodes) * int(job.nproc_per_node))
        case ["python", "-m", "benchmarks"]:
            pass  # tests/docs/test_performance.py runs it
        case ["python", "-m", "benchmarks", name, *rest]:
            check_module(f"benchmarks.{name}", rest)
        case ["python", "-m", module, *rest]:
            check_module(module, rest)
        case ["python", path, *rest]:
            check_module(path.removesuffix(".py").replace("/", "."), rest)
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"the Makefile has no {target}"
        case ["cd", folder]:
            assert (Path(folder) / "recipe.py").exists()
        case [".", script]:
            assert script == ".venv/bin/activate"
        case [program, *_] if program.startswith(".venv/bin/"):
            assert (Path(sys.executable).parent / Path(program).name).exists(), f"setup installs no {program}"
        case _:
            pytest.fail("no rule for this command: add one")


def check_ours(words: list[str], processes: int | None = None) -> None:
    """A command of ours: parsed, its config checked for `processes`; the quick ones run."""
    name = words[0]
    assert name in COMMANDS, "no such command"
    if name in WHOLE:
        with pytest.raises(SystemExit) as left:
            main([*words[:2], "--dry-run", *words[2:]] if name == "launch" else words)
        assert not left.value.code
        return
    command, rest = typer.main.get_command(build_app(name)), words
    while hasattr(command, "resolve_command"):
        _, command, rest = command.resolve_command(typer.Context(command), list(rest))
    given = command.make_context(name, list(rest)).params
    if name == "pretrain":
        cfg = choose_config(given["recipe"], given["config"], given["overrides"])
        if processes is None:
            processes = given["nproc"] or (minimum_world_size(cfg.model) if given["dry_run"] else 1)
        cfg.finalize(processes)


def check_module(module: str, words: list[str]) -> None:
    """A module that parses its arguments with argparse, or takes none."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if "argparse" not in path.read_text(encoding="utf-8"):
        assert not words or "sys.argv" in path.read_text(encoding="utf-8")
        return
    with pytest.MonkeyPatch.context() as patch:
        parse = argparse.ArgumentParser.parse_args

        def parse_and_leave(self: argparse.ArgumentParser, args: list[str] | None = None) -> None:
            parse(self, args)
            raise SystemExit("parsed")

        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
        patch.setattr(sys, "argv", [module, *words])
        with pytest.raises(SystemExit, match="parsed"):
            runpy.run_path(str(path), run_name="__main__")


@pytest.fixture
def quick(monkeypatch):
    """Runs from the root; `verify` plans its layouts and compares nothing."""
    monkeypatch.setattr(megatron_mtp.verify.run, "verify", lambda *_: [])
    monkeypatch.setattr(megatron_mtp.verify.run, "print_outcomes", lambda _: None)
    monkeypatch.chdir(ROOT)


def into(folder: Path, line: str) -> list[str]:
    """Words of a command; files that it writes or reads and that the project lacks are in `folder`."""
    words = shlex.split(line)
    files = {after for word, after in itertools.pairwise(words) if word in FILES}
    return [str(folder / word) if word in files and not Path(word).exists() else word for word in words]


@pytest.mark.parametrize(("page", "line", "output"), CASES)
def test_command(page, line, output, quick, tmp_path, capsys, monkeypatch):
    text = page.read_text(encoding="utf-8")
    for name, content in re.findall(r"```(?:yaml|python)\n# ([\w.]+)\n(.*?)```", text, re.S):
        (tmp_path / name).write_text(content)
    for earlier, _ in commands(text):
        written = re.search(r"--write (\S+)", earlier)
        if written and f"--config {written[1]}" in line:
            check(into(tmp_path, earlier))
    if project := re.search(r"megatron-mtp new (\w+)", text):
        new_project(project[1], tmp_path)
        monkeypatch.chdir(tmp_path if line.startswith("cd ") else tmp_path / project[1])
    words = into(tmp_path, line)
    if output is None:
        check(words)
        return
    with pytest.raises(SystemExit) as left:
        main(words[1:])
    printed = capsys.readouterr()
    assert (printed.out + printed.err).strip() == output.strip()
    assert left.value.code == 2


@pytest.mark.parametrize(
    "line",
    [
        "megatron-mtp verify deepseek_v3 --layouts 'pp=4,layout=Et|tt|mm|L'",
        "megatron-mtp launch slurm deepseek_v3 --nodes 32 checkpoint.save=/a checkpoint.load=/a dataset.mock=true",
        "megatron-mtp launch slurm deepseek_v3 --nodes 128 checkpoint.save=/a checkpoint.load=/a",
        "megatron-mtp generate",
        "megatron-mtp pretrain tiny_dense --nprocs 2",
        "megatron-mtp pretrain deepseek_v3 --nproc 8",
        "python -m megatron_mtp.drafting.fit",
        "torchrun --nnodes 2 --nproc-per-node 8 -m megatron_mtp pretrain deepseek_v3",
        "make tests",
        "npm install",
    ],
)
def test_a_command_that_fails_is_found(line, quick):
    with pytest.raises((AssertionError, SystemExit, Exception, pytest.fail.Exception)):
        check(shlex.split(line))
