"""What doctor finds on complete and on broken installations."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megatron_mtp.cli.doctor import doctor
from megatron_mtp.doctor import checks as doctor_checks
from megatron_mtp.doctor.checks import Finding
from megatron_mtp.doctor.report import abilities, examine, print_table, report_text

pytestmark = pytest.mark.unit

COMPLETE = [Finding(name, "ok", "1.0") for name in ("Python", "torch", "Megatron-Core", "gloo")]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes importable modules, here and in processes that are started from here."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def add(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return add


def only(check: Callable[[], Iterator[Finding]], name: str) -> Finding:
    (finding,) = [finding for finding in check() if finding.name == name]
    return finding


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import os; os.abort()", "the process ended with -6"),
        ("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol"),
        ("raise SystemExit(3)", "the process ended with 3"),
    ],
)
def test_a_broken_transformer_engine_is_reported(install: Callable[[str, str], None], source: str, found: str):
    install("transformer_engine/__init__.py", "")
    install("transformer_engine/pytorch.py", source)
    finding = only(doctor_checks.check_transformer_engine, "Transformer Engine")
    assert finding.state == "warning"
    assert found in finding.found
    assert "model.backend = torch" in finding.advice


def test_the_other_apex_is_distinguished_from_nvidias(install: Callable[[str, str], None]):
    install("apex/__init__.py", "")
    finding = only(doctor_checks.check_apex, "Apex")
    assert finding.state == "warning"
    assert "another project" in finding.advice
    install("apex/multi_tensor_apply.py", "")
    install("apex/optimizers.py", "")
    assert only(doctor_checks.check_apex, "Apex").state == "ok"


@pytest.mark.parametrize(
    ("error", "core", "helpers"),
    [
        ("ModuleNotFoundError: No module named 'megatron.core.datasets.helpers_cpp'", "ok", "warning"),
        ("ImportError: libcudart.so.12", "failed", None),
    ],
)
def test_megatron_core_is_distinguished_from_its_helpers(
    monkeypatch: pytest.MonkeyPatch, error: str, core: str, helpers: str | None
):
    monkeypatch.setattr(doctor_checks, "import_error", lambda *modules: error)
    states = {finding.name: finding.state for finding in doctor_checks.check_megatron()}
    assert states["Megatron-Core"] == core
    assert states.get("dataset helpers") == helpers


def test_a_gpu_that_torch_cannot_see_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_checks._no_gpu("13.2").state == "absent"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    tool.chmod(0o755)
    for built_for, advice in (("13.2", "driver"), (None, "CPU build")):
        finding = doctor_checks._no_gpu(built_for)
        assert finding.state == "warning"
        assert "GPU 0: NVIDIA H100" in finding.found
        assert advice in finding.advice


def test_a_folder_that_cannot_be_written_is_reported(monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: str):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_checks.tempfile, "TemporaryFile", refuse)
    finding = only(doctor_checks.check_machine, "this folder")
    assert finding.state == "warning"
    assert "Permission denied" in finding.found


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit("boom")])
def test_a_check_that_breaks_does_not_stop_the_others(error: BaseException):
    def check_first() -> Iterator[Finding]:
        yield Finding("before", "ok", "")
        raise error

    def check_second() -> Iterator[Finding]:
        yield Finding("after", "ok", "")

    findings = examine([check_first, check_second])
    assert [(finding.name, finding.state) for finding in findings] == [
        ("before", "ok"),
        ("first", "failed"),
        ("after", "ok"),
    ]
    assert "boom" in findings[1].found


def test_abilities_follow_from_the_findings():
    def can(*extra: Finding, without: str = "") -> list[bool]:
        return list(abilities([f for f in COMPLETE if f.name != without] + list(extra)).values())

    gpus = [Finding("GPU 0", "ok", ""), Finding("GPU 1", "ok", "")]
    nccl, engine = Finding("NCCL", "ok", ""), Finding("Transformer Engine", "ok", "")
    assert can() == [True, False, False, False]
    assert can(without="gloo") == [False, False, False, False]
    assert can(gpus[0], nccl) == [True, True, False, False]
    assert can(*gpus, nccl, engine) == [True, True, True, True]
    assert can(*gpus, Finding("NCCL", "failed", "")) == [True, True, False, False]
    assert can(Finding("GPU", "warning", "torch sees none"), engine) == [True, False, False, False]
    assert can(*gpus, nccl, engine, without="torch") == [False, False, False, False]


def test_report_holds_no_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NCCL_AUTH_TOKEN", "hush-hush")
    monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HOME", "/home/someone")
    findings = [*COMPLETE, Finding("proxy", "failed", "no answer from http://me:hush-hush@proxy and /home/someone/x")]
    text = report_text(findings)
    assert "hush-hush" not in text
    assert "/home/someone" not in text
    assert "~/x" in text
    assert "OMP_NUM_THREADS=3" in text
    assert "torch " in text


def test_table_shows_text_with_brackets(capsys: pytest.CaptureFixture[str]):
    print_table([Finding("a", "failed", "[Errno 2]", "see [te] [/]")])
    text = capsys.readouterr().out
    assert "[Errno 2]" in text
    assert "[te] [/]" in text


def test_the_command_on_this_machine(tmp_path: Path):
    app = typer.Typer()
    app.command()(doctor)
    report = tmp_path / "report.txt"
    result = CliRunner().invoke(app, ["--json", "--report", str(report)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    states = {finding["name"]: finding["state"] for finding in found["findings"]}
    assert found["can_run"]["training on the CPU"] is True
    for name in ("Python", "torch", "gloo", "Megatron-Core", "dataset helpers", "this folder"):
        assert states[name] == "ok", name
    assert "failed" not in states.values()
    assert "megatron-core 0.19" in report.read_text()


def test_a_report_that_cannot_be_written_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch):
    from megatron_mtp.doctor import report as tool
    from megatron_mtp.errors import ConfigError

    monkeypatch.setattr(tool, "examine", lambda: COMPLETE)
    with pytest.raises(ConfigError, match=r"--report /nowhere/report\.txt"):
        doctor(report=Path("/nowhere/report.txt"))


def test_exit_code_is_1_where_nothing_can_be_trained(monkeypatch: pytest.MonkeyPatch):
    from megatron_mtp.doctor import report as tool

    monkeypatch.setattr(tool, "examine", lambda: [Finding("torch", "failed", "none")])
    with pytest.raises(typer.Exit) as stopped:
        doctor(report=None, json=True)
    assert stopped.value.exit_code == 1


def test_the_command_is_light_to_mount():
    code = "import sys, megatron_mtp.cli.doctor; sys.exit(str({'torch', 'megatron', 'rich.table'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "set()"
