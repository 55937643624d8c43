"""Runs one benchmark, or lists them.

python -m benchmarks                  # the list
python -m benchmarks head --rounds 5  # one of them, with its own options
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

NOT_BENCHMARKS = ("__main__", "timing", "page")


def names() -> dict[str, str]:
    """Name -> first line of the docstring."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in NOT_BENCHMARKS:
            found[path.stem] = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
    return found


def main() -> None:
    """Lists the benchmarks, or runs the one that is named."""
    known = names()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        for name, line in known.items():
            print(f"{name:<16} {line}")
        return
    name = sys.argv.pop(1)
    if name not in known:
        sys.exit(f"{name}: no benchmark of that name. There are: {', '.join(known)}.")
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
