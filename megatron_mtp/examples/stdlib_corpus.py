"""The source code of the Python standard library as JSONL: real text that every machine has, for the demo."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

from megatron_mtp.data.files import replacing

# Installed packages, tests, and `encodings`, whose tables are nearly equal.
_SKIPPED_FOLDERS = set("site-packages dist-packages __pycache__ test tests idle_test lib2to3 encodings".split())
HELD_OUT_PERCENT = 5


def stdlib_jsonl(out_dir: str | Path) -> tuple[Path, Path]:
    """Writes `stdlib_train.jsonl` and `stdlib_valid.jsonl`: one source file per line, sorted by path.

    A hash of its content decides whether a file is held out, so both parts never share a text.
    """
    train: list[str] = []
    valid: list[str] = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if not text.strip():
            continue
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        part = valid if digest % 100 < HELD_OUT_PERCENT else train
        part.append(json.dumps({"text": text, "path": relative.as_posix()}, ensure_ascii=False))
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    return _write(out / "stdlib_train.jsonl", train), _write(out / "stdlib_valid.jsonl", valid)


def _write(path: Path, lines: list[str]) -> Path:
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
