"""Every key of a family's config class and every field of ModelConfig, varied: both sides compute the same logits, or a
refusal names what was varied."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mtp.convert.hf_families import FAMILIES
from tests.convert import older_transformers
from tests.convert.generated import Case, Outcome, counts, export_cases, import_cases, outcomes, pairs

pytestmark = pytest.mark.dist

OLDER = "MEGATRON_MTP_TRANSFORMERS_4"
"""Environment variable: a folder with transformers 4 and what it needs, besides this environment."""
NUM_FAST, NUM_PAIRS = 3, 60


def check(ranks, cases: list[Case], folder: Path, *, keep: bool = False) -> list[Outcome]:
    found = [o for start in range(0, len(cases), 40) for o in _run(ranks, cases[start : start + 40], folder, keep)]
    print("\n".join(counts(found)))
    wrong = [
        f"{o.case.family} {o.case.label}: {o.kind}, {o.detail}" for o in found if o.kind in ("different", "unnamed")
    ]
    assert not wrong, "\n".join(wrong)
    return found


def _run(ranks, cases: list[Case], folder: Path, keep: bool) -> list[Outcome]:
    (found,) = ranks(1).run(outcomes, cases, str(folder), keep)
    return found


def test_some_cases_of_every_family(ranks, tmp_path):
    """A fixed sample, in both directions."""
    drawn, cases = random.Random(1), []
    for family in FAMILIES:
        fields = [case for case in export_cases(family) if "mcore" not in (case.model or {})]
        cases += drawn.sample(import_cases(family), NUM_FAST) + drawn.sample(fields, NUM_FAST)
    kinds = [outcome.kind for outcome in check(ranks, cases, tmp_path)]
    assert kinds.count("equal") >= 20
    assert kinds.count("refused") >= 10


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_import_of_every_key(family, ranks, tmp_path):
    """One key varied, then pairs of keys that were accepted alone."""
    found = check(ranks, import_cases(family), tmp_path)
    accepted = [outcome.case for outcome in found if outcome.kind == "equal"]
    assert len(accepted) >= 50
    check(ranks, pairs(accepted, NUM_PAIRS), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_export_of_every_field(family, ranks, tmp_path):
    found = check(ranks, export_cases(family), tmp_path)
    kinds = [outcome.kind for outcome in found]
    assert kinds.count("equal") >= 100
    assert kinds.count("refused") >= 100


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_4_reads_the_same(family, ranks, tmp_path):
    """Logits of every varied export, computed by the installed release and by transformers 4."""
    older = os.environ.get(OLDER)
    if not older:
        pytest.skip(f"{OLDER} names no folder with transformers 4 (CONTRIBUTING.md)")
    cases = [case for case in export_cases(family) if "mcore" not in (case.model or {})]
    check(ranks, cases, tmp_path, keep=True)
    folders: dict[str, Path] = {}
    for path in sorted(tmp_path.glob("*/logits.pt")):
        folders.setdefault((path.parent / "config.json").read_text(), path.parent)
    done = subprocess.run(
        [sys.executable, older_transformers.__file__, *map(str, folders.values())],
        env=os.environ | {"PYTHONPATH": older},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert errors.pop("version").startswith("4.")
    print(f"{family}: {len(errors)} exports read by transformers 4")
    limit = 1e-4 if family == "qwen3_next" else 1e-5
    configs = {folder.name: text for text, folder in folders.items()}
    wrong = [f"{e}: {configs[name][:2000]}" for name, e in errors.items() if not isinstance(e, float) or e > limit]
    assert not wrong, "\n".join(wrong)
    assert len(errors) >= 20
