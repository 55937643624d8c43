"""Compares the tensors of a folder with those that a model needs, before anything is written. Needs no megatron."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_mtp.convert.links import TensorLink
from megatron_mtp.convert.names import IGNORED_ENDINGS
from megatron_mtp.convert.tensor_files import TensorFiles
from megatron_mtp.errors import ConversionError, nearest

_MOST_SHOWN = 20
FP32_ENDINGS = ("e_score_correction_bias", "linear_attn.A_log", "linear_attn.norm.weight")
"""Tensors that stay in fp32 whatever the dtype of the weights."""
CONVERTED = ("F32", "BF16", "F16")
"""Dtypes that weights may have."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """The tensors in the files that are not read through a link.

    Args:
        dtype: code of the weights' dtype.
        tied: repeat a weight that they are tied to.
        duplicated: repeat a weight, as in released files.
        ignored: buffers that every loader recomputes, tensors without elements, and what the caller drops.
    """

    dtype: str
    tied: list[str]
    duplicated: list[str]
    ignored: list[str]


def check_inventory(
    files: TensorFiles,
    links: list[TensorLink],
    *,
    duplicates: dict[str, str],
    tied: dict[str, str],
    dropped: Iterable[str] = (),
) -> Inventory:
    """Checks names, shapes, dtypes and repeated tensors.

    Args:
        duplicates: optional names -> the tensor that they must equal.
        tied: the same for tied weights.
        dropped: names that the caller leaves out.

    Raises:
        ConversionError: names all tensors that are missing, left over, of a wrong shape or dtype, or repeated with
            other values.
    """
    needed = {hf.name: hf.shape for link in links for hf in link.theirs}
    found = files.entries
    # transformers stores parts of width 0, such as the shared experts of a model without any.
    empty = {name for name, entry in found.items() if 0 in entry.shape and name not in needed}
    ignored = {name for name in found if name.endswith(IGNORED_ENDINGS)} | (set(dropped) & set(found)) | empty
    known = set(needed) | set(duplicates) | set(tied) | ignored
    missing, surplus = sorted(set(needed) - set(found)), sorted(set(found) - known)
    problems = [f"{name} is missing.{nearest(name, surplus, cutoff=0.8)}" for name in missing]
    problems += [f"{name} has no place in the model.{nearest(name, missing, cutoff=0.8)}" for name in surplus]
    dtype = _dtype(files, [name for name in needed if name in found])
    for name in sorted(set(needed) & set(found)):
        entry = found[name]
        if entry.shape != needed[name]:
            problems.append(f"{name} has shape {list(entry.shape)}, the model needs {list(needed[name])}.")
        code = files.dtype_of(name)
        if code != dtype and not (code == "F32" and name.endswith(FP32_ENDINGS)):
            problems.append(
                f"{name} is {code}, the weights are {dtype}: only one dtype can be converted. Save the model in "
                "one dtype with transformers first."
            )
    repeated = {name: of for name, of in (duplicates | tied).items() if name in found and of in found}
    if not problems:
        problems += [
            f"{name} differs from {of}, which it should repeat: a model that shares them cannot hold both."
            for name, of in sorted(repeated.items())
            if not files.are_equal(name, of)
        ]
    if problems:
        shown = problems[:_MOST_SHOWN]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise ConversionError("\n".join([f"{files.folder}: nothing was written.", *shown, *more]))
    return Inventory(
        dtype=dtype,
        tied=files.names_in_files(name for name in tied if name in found),
        duplicated=files.names_in_files(name for name in duplicates if name in found),
        ignored=files.names_in_files(ignored),
    )


def _dtype(files: TensorFiles, names: list[str]) -> str:
    """The dtype of most tensors. config.json does not count: its dtype often is another than that of the files."""
    counts = Counter(files.dtype_of(name) for name in names)
    most = counts.most_common(1)[0][0] if counts else "F32"
    if most not in CONVERTED:
        raise ConversionError(f"{files.folder}: the tensors are {most}; {', '.join(CONVERTED)} can be converted.")
    return most
