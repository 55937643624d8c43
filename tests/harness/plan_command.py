"""`megatron-mtp plan` inside this process."""

from __future__ import annotations

import pytest

from megatron_mtp.cli.main import main


@pytest.fixture
def run(capsys):
    """A function of the command's arguments that returns its exit code, output and errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["plan", *arguments])
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return call
