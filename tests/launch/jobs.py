"""A job of `tiny_dense` for tests, and the tools that check what is rendered of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mtp.launch.job import Job
from megatron_mtp.recipes import get_recipe

OVERRIDES = [
    "train.train_iters=50",
    'model.mtp_loss_scaling_factor="0.3@0,0.1@10T"',
    "logger.wandb_exp_name=it's $HOME",
]


def make_job(files: list[Path] | None = None, nodes: int = 2, name: str = "tiny-dense", **fields: Any) -> Job:
    """Two nodes of eight GPUs that train on mock data.

    Args:
        fields: of the job, or `section__field` of its config.
    """
    cfg = get_recipe("tiny_dense")
    cfg.checkpoint.save = cfg.checkpoint.load = "/shared/run"
    cfg.dist.device, cfg.dataset.mock = "cuda", True
    cfg.train.global_batch_size = 32
    for field in [field for field in fields if "__" in field]:
        section, _, member = field.partition("__")
        setattr(getattr(cfg, section), member, fields.pop(field))
    cfg.finalize(nodes * 8)
    given: dict[str, Any] = {"recipe": "tiny_dense", "arguments": OVERRIDES, **fields}
    return Job(cfg=cfg, files=files or [], name=name, nodes=nodes, gpus_per_node=8, **given)


def make_script(folder: Path) -> Job:
    """The same for a script."""
    script = folder / "my train.py"
    script.write_text("from megatron_mtp import main\n")
    return make_job(recipe=None, script=script, arguments=["--rate", "it's 3"])
