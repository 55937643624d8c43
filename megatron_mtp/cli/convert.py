"""`megatron-mtp convert import|export|check`: weights from and to Hugging Face folders."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

convert = typer.Typer(no_args_is_help=True, help="Exchange weights with Hugging Face folders, MTP layers included.")


class Init(StrEnum):
    """How MTP layers are made that the files lack."""

    last_layer = "last_layer"
    fresh = "fresh"


class Dtype(StrEnum):
    """Dtypes of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Checkpoint = Annotated[
    Path, typer.Argument(help="Run directory (its newest checkpoint), or the folder of one checkpoint.")
]
Family = Annotated[
    str | None, typer.Option(help="Form of the files, such as qwen3; default: the one that has this architecture.")
]
Depths = Annotated[
    int | None, typer.Option("--mtp-depths", min=0, help="MTP layers of the result; default: all there are.")
]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write what became of every tensor as JSON.")
]


@convert.command("import")
def import_(
    hf_dir: Annotated[Path, typer.Argument(help="config.json, *.safetensors and tokenizer files.")],
    out: Annotated[Path, typer.Argument(help="Run directory for the checkpoint; must hold none.")],
    recipe: Annotated[
        str | None, typer.Option(help="Recipe to save with the weights; its architecture must be config.json's.")
    ] = None,
    mtp_depths: Depths = None,
    mtp_init: Annotated[
        Init | None,
        typer.Option(
            help="Make MTP layers that the files lack: copies of the trunk's last layer, or as in a new model."
        ),
    ] = None,
    report: ReportFile = None,
) -> None:
    """Write a checkpoint of iteration 0 with the weights of HF_DIR. A run starts from it with checkpoint.pretrained_checkpoint=OUT."""
    from megatron_mtp.recipes import get_recipe

    _quiet()
    cfg = get_recipe(recipe) if recipe else None
    from megatron_mtp.convert.importing import import_hf

    _print(import_hf(hf_dir, out, cfg, mtp_depths=mtp_depths, mtp_init=mtp_init.value if mtp_init else None), report)


@convert.command()
def export(
    checkpoint: Checkpoint,
    hf_dir: Annotated[Path, typer.Argument(help="Folder to make.")],
    family: Family = None,
    mtp_depths: Depths = None,
    duplicates: Annotated[
        bool,
        typer.Option(
            "--mtp-duplicates/--no-mtp-duplicates",
            help="Copies of embedding and head beside each MTP layer, where released files of the family hold them.",
        ),
    ] = True,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: as stored.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder or tokenizer.json; default: the run's.")] = None,
    with_tokenizer: Annotated[
        bool, typer.Option("--with-tokenizer/--no-tokenizer", help="Write tokenizer files.")
    ] = True,
    shard_gb: Annotated[float, typer.Option(help="GB (10^9 bytes) of one file.")] = 5.0,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare every byte of the checkpoint with its manifest first.")
    ] = True,
    report: ReportFile = None,
) -> None:
    """Write weights, config, tokenizer and generation settings of a checkpoint for transformers, vLLM and SGLang."""
    _quiet()
    from megatron_mtp.convert.exporting import export_hf

    made = export_hf(
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
    _print(made, report)


@convert.command()
def check(
    checkpoint: Checkpoint,
    hf_dir: Annotated[Path, typer.Argument(help="Folder to compare with.")],
    family: Family = None,
    mtp_depths: Depths = None,
) -> None:
    """Compare every tensor of a checkpoint and a folder. Exit code 1 if any differs."""
    _quiet()
    from megatron_mtp.convert.checking import check_hf

    result = check_hf(checkpoint, hf_dir, family=family, mtp_depths=mtp_depths)
    typer.echo(f"{result.num_equal} tensors hold the same bits, {len(result.different)} do not")
    for name, difference in result.different.items():
        typer.echo(f"{name}: differs by up to {difference:.3g}")
    if not result.is_equal:
        raise typer.Exit(1)


def _quiet() -> None:
    """Before the imports that make the noise."""
    from megatron_mtp.observe.logs import silence_noise

    silence_noise()


def _print(made, report: Path | None) -> None:
    for line in made.lines():
        typer.echo(line)
    if report is not None:
        made.to_json(report)
