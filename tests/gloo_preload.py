"""Imported once by the fork server, so that worker processes of the tests start in a tenth of a second."""

import torch.distributed  # noqa: F401
from megatron.core.distributed import DistributedDataParallel  # noqa: F401
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: F401
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: F401

import megatron_mtp.model.torch_backend
import megatron_mtp.verify.preload  # noqa: F401
