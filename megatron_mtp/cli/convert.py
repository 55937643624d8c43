"""`megatron-mtp convert`: converts weights from and to Hugging Face folders and Megatron-LM's checkpoints."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_mtp.cli.addresses import accepts_addresses
from megatron_mtp.cli.choose import Files, Overrides, choose_config
from megatron_mtp.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mtp.convert.report import Report

convert = typer.Typer(
    no_args_is_help=True,
    help="Convert weights from and to Hugging Face folders and Megatron-LM's checkpoints, with MTP layers.",
)


class Init(StrEnum):
    """How to initialise MTP layers that the files lack."""

    last_layer = "last_layer"
    fresh = "fresh"


class Dtype(StrEnum):
    """Dtypes of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Spec(StrEnum):
    """Layer specs of Megatron-Core."""

    te = "te"
    local = "local"


Checkpoint = Annotated[
    Path,
    typer.Argument(help="Run directory (its newest checkpoint is used), RUN@200, RUN@best, or a checkpoint's folder."),
]
Family = Annotated[
    str | None,
    typer.Option(help="Model family of the files, such as qwen3. Default: the one that fits the architecture."),
]
Depths = Annotated[int | None, typer.Option("--mtp-depths", min=0, help="MTP layers of the result. Default: all.")]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write to this JSON file what was done with every tensor."),
]


@convert.command("import")
def import_(
    hf_dir: Annotated[Path, typer.Argument(help="Folder with config.json, *.safetensors and tokenizer files.")],
    out: Annotated[Path, typer.Argument(help="Run directory for the checkpoint; it must not hold one.")],
    recipe: Annotated[
        str | None, typer.Option(help="Recipe to save with the weights; it must have the architecture of config.json.")
    ] = None,
    mtp_depths: Depths = None,
    mtp_init: Annotated[
        Init | None,
        typer.Option(
            help="Initialise MTP layers that the files lack: copies of the trunk's last layer, or as in a new model."
        ),
    ] = None,
    report: ReportFile = None,
) -> None:
    """Convert HF_DIR to a checkpoint of iteration 0. Start a run from it with checkpoint.pretrained_checkpoint=OUT."""
    from megatron_mtp.recipes import get_recipe

    cfg = get_recipe(recipe) if recipe else None
    from megatron_mtp.convert.importing import import_hf

    _print(import_hf(hf_dir, out, cfg, mtp_depths=mtp_depths, mtp_init=mtp_init.value if mtp_init else None), report)


@convert.command()
@accepts_addresses("checkpoint")
def export(
    checkpoint: Checkpoint,
    hf_dir: Annotated[Path, typer.Argument(help="Folder to create.")],
    family: Family = None,
    mtp_depths: Depths = None,
    duplicates: Annotated[
        bool,
        typer.Option(
            "--mtp-duplicates/--no-mtp-duplicates",
            help="Write copies of embedding and head for each MTP layer if released files of the family have them.",
        ),
    ] = True,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the exported weights. Default: as stored.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder or tokenizer.json to export. Default: the run's.")
    ] = None,
    with_tokenizer: Annotated[
        bool, typer.Option("--with-tokenizer/--no-tokenizer", help="Write tokenizer files.")
    ] = True,
    shard_gb: Annotated[float, typer.Option(help="Size of one file in GB (10^9 bytes).")] = 5.0,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="First compare every byte of the checkpoint with its manifest.")
    ] = True,
    report: ReportFile = None,
) -> None:
    """Write weights, config, tokenizer and generation settings of a checkpoint for transformers, vLLM and SGLang."""
    from megatron_mtp.convert.exporting import export_hf

    done = export_hf(
        checkpoint,
        hf_dir,
        family=family,
        mtp_depths=mtp_depths,
        mtp_duplicates=duplicates,
        dtype=dtype.value if dtype else None,
        tokenizer=tokenizer,
        with_tokenizer=with_tokenizer,
        shard_bytes=round(shard_gb * 1e9),
        verify=verify,
    )
    _print(done, report)


@convert.command()
@accepts_addresses("checkpoint")
def check(
    checkpoint: Checkpoint,
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face folder to compare with.")],
    family: Family = None,
    mtp_depths: Depths = None,
) -> None:
    """Compare every tensor of a checkpoint with a Hugging Face folder. Exit code 1 if any differs."""
    from megatron_mtp.convert.checking import check_hf

    result = check_hf(checkpoint, hf_dir, family=family, mtp_depths=mtp_depths)
    typer.echo(f"{result.num_equal} tensors are equal bit for bit, {len(result.different)} are not")
    for name, difference in result.different.items():
        typer.echo(f"{name}: differs by up to {difference:.3g}")
    if not result.is_equal:
        raise typer.Exit(1)


@convert.command("from-megatron")
def from_megatron(
    source: Annotated[
        Path, typer.Argument(help="Run directory of Megatron-LM or Megatron-Bridge, or one of its iter_... folders.")
    ],
    out: Annotated[Path, typer.Argument(help="Run directory for the checkpoint; it must not hold one.")],
    overrides: Overrides = None,
    config: Files = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe to save with the weights; it must have their architecture. Default: what they say."),
    ] = None,
    with_optimizer: Annotated[
        bool,
        typer.Option(
            "--with-optimizer", help="Take optimizer state and counters too: resume with checkpoint.load=OUT."
        ),
    ] = False,
    report: ReportFile = None,
) -> None:
    """Convert a torch_dist checkpoint of Megatron-LM or Megatron-Bridge, MTP layers included."""
    if recipe is None and (overrides or config):
        raise ConfigError("Config changes belong to a recipe: name it with --recipe.")
    cfg = choose_config(recipe, config, overrides) if recipe else None
    from megatron_mtp.convert.megatron import import_megatron

    _print(import_megatron(source, out, cfg, with_optimizer=with_optimizer), report)


@convert.command("to-megatron")
@accepts_addresses("checkpoint")
def to_megatron(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Run directory of Megatron-LM to create.")],
    spec: Annotated[
        Spec, typer.Option(help="Layer specs that will read it: Transformer Engine's, or Megatron-Core's local ones.")
    ] = Spec.te,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="First compare every byte of the checkpoint with its manifest.")
    ] = True,
    report: ReportFile = None,
) -> None:
    """Write the weights of a checkpoint as a torch_dist checkpoint that Megatron-LM and Megatron-Bridge start from."""
    from megatron_mtp.convert.megatron_export import export_megatron

    _print(export_megatron(checkpoint, out, spec=spec.value, verify=verify), report)


def _print(done: Report, report: Path | None) -> None:
    for line in done.lines():
        typer.echo(line)
    if report is not None:
        done.to_json(report)
