"""The command `megatron-mtp`. The module of a subcommand is imported only if that subcommand is given."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable

import typer

from megatron_mtp.cli.addresses import refuse_addresses, refuse_addresses_in
from megatron_mtp.errors import MegatronMTPError
from megatron_mtp.launch.failure import exit_code_of
from megatron_mtp.observe.logs import silence_noise

# name -> (module:function, line in the overview)
COMMANDS = {
    "recipes": ("megatron_mtp.cli.recipes:recipes", "List the recipes with their sizes."),
    "new": ("megatron_mtp.cli.new:new", "Write a small project: a recipe of your own."),
    "show": ("megatron_mtp.cli.show:show", "Print the resolved config of a run, with hints."),
    "plan": ("megatron_mtp.cli.plan:plan", "Plan the pipeline split and parallel sizes of a run."),
    "profile": ("megatron_mtp.cli.profile:profile", "Time each part of a model, for `plan --profile`."),
    "pretrain": ("megatron_mtp.cli.pretrain:pretrain", "Train a model."),
    "watch": ("megatron_mtp.cli.watch:watch", "Show a run live in the terminal."),
    "report": ("megatron_mtp.cli.report:report", "Draw a run, or compare several, as one HTML page."),
    "launch": ("megatron_mtp.cli.launch:launch", "Start a job on this machine, Slurm or Kubernetes."),
    "verify": (
        "megatron_mtp.cli.verify:verify",
        "Compare parallel layouts with one rank, on a small model.",
    ),
    "evaluate": (
        "megatron_mtp.cli.evaluate:evaluate",
        "Evaluate a checkpoint: losses of every depth.",
    ),
    "checkpoint": (
        "megatron_mtp.cli.checkpoint:checkpoint",
        "List, verify, average and remove checkpoints.",
    ),
    "convert": ("megatron_mtp.cli.convert:convert", "Convert weights: Hugging Face folders, Megatron-LM."),
    "prepare": ("megatron_mtp.cli.prepare:prepare", "Turn text into training data."),
    "train-tokenizer": ("megatron_mtp.cli.train_tokenizer:train_tokenizer", "Train a tokenizer on JSONL text."),
    "data": ("megatron_mtp.cli.data:data", "Show, measure, check, merge and split prepared data."),
    "check-data": ("megatron_mtp.cli.data:check", "The same as `data check`."),
    "generate": ("megatron_mtp.cli.generate:generate", "Continue text, with the MTP layers as drafters."),
    "spec-eval": ("megatron_mtp.cli.spec_eval:spec_eval", "Measure what drafting gains on held-out text."),
    "doctor": ("megatron_mtp.cli.doctor:doctor", "Check what this machine can run."),
}


def main(argv: list[str] | None = None) -> None:
    """Runs one command and exits: 0 on success, 2 for a mistake of the user (one message, no traceback).

    With --json, what is wrong is printed as JSON too. If standard output takes no more, such as a full disk or a pipe
    whose reader is gone, the exit code is 1.
    """
    try:
        _run(argv)
    except (SystemExit, OSError) as end:
        # A write that failed is forgotten by the stream. If it may have been one to standard output, try again.
        _finish_output("\n" if isinstance(end, OSError) and end.filename is None else "")
        raise


def _run(argv: list[str] | None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    silence_noise()  # before a command imports torch and megatron
    try:
        build_app(chosen)(args=arguments, prog_name="megatron-mtp")
    except Exception as error:
        # spec-eval's --json names a file
        if "--json" in arguments and chosen != "spec-eval" and isinstance(error, MegatronMTPError):
            data = {"error": type(error).__name__, "problems": [problem.as_dict() for problem in error.problems]}
            typer.echo(json.dumps(data, indent=2, default=str))
        sys.exit(exit_code_of(error))


def _finish_output(rest: str) -> None:
    """Writes the rest to standard output, and exits if that fails; whatever else went wrong came from this."""
    try:
        if sys.stdout is not None:
            sys.stdout.write(rest)
            sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "w") as sink:  # or Python fails to flush once more when it exits
            os.dup2(sink.fileno(), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"megatron-mtp: standard output cannot be written: {error.strerror}.", file=sys.stderr)
        sys.exit(1)


def build_app(chosen: str | None) -> typer.Typer:
    """The command line: every command is listed, only the chosen one is imported."""
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        help="Pretraining with multi-token prediction on Megatron-Core.",
    )
    app.callback()(_version)
    for name, (target, line) in COMMANDS.items():
        command = _load(target) if name == chosen else _unused
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, short_help=line)
        else:
            app.command(name, short_help=line)(command)
    return app


def _load(target: str) -> Callable[..., None] | typer.Typer:
    module, function = target.split(":")
    command = getattr(importlib.import_module(module), function)
    return refuse_addresses_in(command) if isinstance(command, typer.Typer) else refuse_addresses(command)


def _unused() -> None:
    """Placeholder of a command that was not chosen."""


def _print_version(wanted: bool) -> None:
    if wanted:
        from megatron_mtp import __version__

        typer.echo(f"megatron-mtp {__version__}")
        raise typer.Exit()


def _version(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass
