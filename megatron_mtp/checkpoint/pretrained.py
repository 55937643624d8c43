"""Loads only the weights of a checkpoint, for a run that starts from them: no optimizer, no counters, any layout."""

from __future__ import annotations

import logging

from torch import nn
from torch.distributed import ProcessGroup

from megatron_mtp.checkpoint.agreement import describe_error, raise_any, run_on_rank_0
from megatron_mtp.checkpoint.content import Content
from megatron_mtp.checkpoint.depth_change import DepthChange
from megatron_mtp.checkpoint.manifest import CONFIG_NAME, damage_error, read_verified
from megatron_mtp.checkpoint.new_layers import NewLayers
from megatron_mtp.checkpoint.preflight import read_saved_config
from megatron_mtp.checkpoint.resuming import UnreadableError, read_plan
from megatron_mtp.checkpoint.untrusted import read_metadata
from megatron_mtp.errors import CheckpointError, MegatronMTPError
from megatron_mtp.storage.place import Place

logger = logging.getLogger(__name__)

_SAME = DepthChange(0, 0, 0, 0)


def load_model_weights(
    folder: Place, chunks: list[nn.Module], dp_cp_group: ProcessGroup, new_layers: NewLayers | None = None
) -> None:
    """Fills the chunks of every rank, in the dtype that they have. A collective.

    Args:
        folder: of one checkpoint.
        chunks: bare or wrapped.
        dp_cp_group: ranks that hold the same weights.
        new_layers: starts MTP layers that the checkpoint lacks; None: it must have the model's.

    Raises:
        CheckpointError: on every rank; the checkpoint is damaged, or its tensors are not the model's; names them.
    """
    run_on_rank_0(lambda: _check(folder))
    error: CheckpointError | None = None
    try:
        content = Content(chunks, None, dp_cp_group)
        plan = content.for_loading(with_random_state=False)
        change = _SAME if new_layers is None else new_layers.change_from(read_saved_config(folder / CONFIG_NAME))
        plan.adopt(read_plan(plan, folder, change, load_optim=False), {})
        if new_layers is not None:
            new_layers.fill(change, folder)
    except UnreadableError as failure:
        error = damage_error(folder, [str(failure)])
    except MegatronMTPError as failure:
        error = CheckpointError(str(failure))
    except Exception as failure:  # any cause on one rank must reach raise_any, or the others wait for it
        logger.debug("loading failed", exc_info=failure)
        error = CheckpointError(f"{folder}: cannot be loaded ({describe_error(failure)}).")
    raise_any(error)


def _check(folder: Place) -> None:
    """Compares every byte with the manifest, and checks pickled parts before anything unpickles them."""
    read_metadata(folder, read_verified(folder))
