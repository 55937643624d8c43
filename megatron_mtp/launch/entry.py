"""What the command and a script of one's own share: exit codes, one message for a mistake, no foreign noise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_mtp.errors import NotSavedError
from megatron_mtp.launch.agent import note_exit
from megatron_mtp.launch.failure import exit_code_of
from megatron_mtp.observe.logs import silence_noise


def exit_code(train: Callable[[], Any]) -> int:
    """Runs a training and returns its exit code, which the agent of the job learns too.

    Args:
        train: returns the summary of `pretrain`; any other result counts as success.
    """
    try:
        code = getattr(train(), "exit_code", 0)
    except NotSavedError as error:
        note_exit(error.exit_code)
        raise
    note_exit(code)
    return code


def main(train: Callable[[], Any]) -> NoReturn:
    """Runs the function of a training script as `megatron-mtp pretrain` runs a recipe, then ends the process.

    A mistake in the config, data or checkpoints ends with one message on one rank and exit code 2, SIGTERM with a
    checkpoint with 3, and so on through the table in docs/operations.md. An exception of one's own code is raised.

        from megatron_mtp import main, pretrain

        if __name__ == "__main__":
            main(lambda: pretrain(my_config()))

    Args:
        train: builds the config and returns the summary of `pretrain`; it runs on every rank.
    """
    silence_noise()
    try:
        code = exit_code(train)
    except Exception as error:  # `exit_code_of` raises again what is not addressed to the user
        code = exit_code_of(error)
    sys.exit(code)
