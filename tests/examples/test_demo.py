"""The demo's verdict, and (slow) the demo itself with its control."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_mtp.data.indexed import IndexedReader, IndexedWriter
from megatron_mtp.examples.demo import (
    DemoData,
    DepthVerdict,
    is_success,
    judge,
    main,
    make_data,
    shuffled_targets,
    train_command,
)


def verdicts(*pairs: tuple[float, float]) -> list[DepthVerdict]:
    return [DepthVerdict(f"depth {k}", 3.0, held_out, bigram, 6.0) for k, (held_out, bigram) in enumerate(pairs)]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("pairs", "passes"),
    [
        ([(3.0, 3.9), (3.1, 5.0), (3.2, 5.5)], True),
        ([(4.0, 3.9), (4.1, 5.0), (4.2, 5.5)], False),  # depth 0 knows pairs only
        ([(3.0, 3.9), (3.3, 5.0), (3.2, 5.5)], False),  # a farther token is not harder
        ([(3.0, 3.9), (float("nan"), 5.0), (3.2, 5.5)], False),
    ],
)
def test_success_needs_every_depth(pairs: list[tuple[float, float]], passes: bool):
    assert is_success(verdicts(*pairs)) is passes


@pytest.mark.unit
def test_the_control_holds_the_same_tokens_in_another_order(tmp_path: Path):
    writer = IndexedWriter(str(tmp_path / "train"), np.dtype(np.uint16))
    tokens = np.arange(500) % 97
    writer.write(tokens, np.array([200, 300]))
    writer.close()
    control = shuffled_targets(DemoData(str(tmp_path / "train"), "valid", "tokenizer"), tmp_path / "control")
    reader = IndexedReader(control.train)
    shuffled = np.concatenate([reader.read(i) for i in range(len(reader))])
    assert len(reader) == 2
    assert sorted(shuffled) == sorted(tokens)
    assert not np.array_equal(shuffled, tokens)
    assert control.valid == "valid"


@pytest.mark.unit
def test_the_command_is_a_valid_run(tmp_path: Path):
    from megatron_mtp.config.overrides import apply_overrides
    from megatron_mtp.recipes import get_recipe

    data = DemoData("train", "valid", "tokenizer.json")
    command = train_command(data, tmp_path / "runs" / "run_001", ["train.train_iters=3"])
    overrides = [word for word in command if "=" in word]
    cfg = get_recipe("demo")
    apply_overrides(cfg, overrides)
    cfg.finalize(2 if "--nproc" in command else 1)
    assert cfg.train.train_iters == 3
    assert cfg.dataset.blend_per_split == [["train"], ["valid"], None]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1800)
def test_the_control_fails_the_check_that_the_demo_passes(tmp_path: Path):
    """Both train for the demo's own length. The control ends where a table of token frequencies does."""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "megatron_mtp.examples.demo", "--folder", str(tmp_path)]
    assert subprocess.run(command, env=environment, check=False, timeout=900).returncode == 0
    assert subprocess.run([*command, "--control"], env=environment, check=False, timeout=900).returncode == 1
    data = make_data(tmp_path / "data")
    demo, control = (judge(tmp_path / run / "metrics.jsonl", data) for run in ("run_001", "run_002"))
    assert all(verdict.is_learnt and not verdict.knows_frequencies_only for verdict in demo)
    assert all(verdict.knows_frequencies_only and not verdict.is_learnt for verdict in control)


@pytest.mark.unit
def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "--control" in capsys.readouterr().out
