"""Computes the logits of exported folders with another release of transformers, in a process of its own.

    PYTHONPATH=FOLDER_OF_TRANSFORMERS_4 python older_transformers.py MODEL_DIR ...

Each folder holds a model, and logits.pt with ids and expected logits. Prints one JSON object: name of the folder ->
relative error, or the error's text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


@torch.no_grad()
def relative_error(folder: Path) -> float:
    from transformers import AutoModelForCausalLM, Qwen2Config

    values = json.loads((folder / "config.json").read_text())
    # MiMo has no class in transformers; its trunk is Qwen2's.
    options = {"config": Qwen2Config(**values)} if values["model_type"] == "mimo" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    ids, expected = torch.load(folder / "logits.pt")
    got = model(input_ids=ids, use_cache=False).logits
    return float((got - expected).abs().max() / expected.abs().max())


def main() -> None:
    import transformers

    found: dict[str, float | str] = {"version": transformers.__version__}
    for folder in map(Path, sys.argv[1:]):
        try:
            found[folder.name] = relative_error(folder)
        except Exception as error:
            found[folder.name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
