"""A rank of a job of any size, in this process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_mtp.device import cpu_facade
from megatron_mtp.device.fake import fake_world

pytestmark = pytest.mark.unit


def test_any_rank_of_any_size_one_after_the_other():
    for rank, world_size in ((0, 1), (1023, 1024), (7, 64)):
        with fake_world(rank, world_size) as device:
            assert (dist.get_rank(), dist.get_world_size()) == (rank, world_size)
            assert torch.cuda.current_device() == device == torch.device("meta")
            total = torch.zeros(4, device="cuda")
            dist.all_reduce(total)
            assert total.is_meta
        assert not dist.is_initialized()
        assert cpu_facade.installed() is None


def test_the_facade_that_was_there_comes_back():
    cpu_facade.install("cpu")
    try:
        with pytest.raises(RuntimeError, match="inside"), fake_world(0, 8):
            raise RuntimeError("inside")
        assert cpu_facade.installed() == torch.device("cpu")
    finally:
        cpu_facade.uninstall()


def test_a_pipeline_stage_of_a_large_model_takes_no_memory():
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from megatron_mtp.model.torch_backend import TorchSpecProvider, build_layer_spec
    from tests.model.torch_backend.tiny import moe_config

    hidden, vocab = 4096, 100_000
    config = moe_config(
        num_layers=8,
        hidden_size=hidden,
        num_attention_heads=32,
        num_moe_experts=64,
        moe_ffn_hidden_size=1024,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        expert_model_parallel_size=8,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
        pipeline_dtype=torch.float32,
    )
    with fake_world(rank=0, world_size=64):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=4,
            expert_model_parallel_size=8,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        spec = TransformerBlockSubmodules(
            layer_specs=[build_layer_spec(config, is_moe=True)] * 2, layer_norm=TorchSpecProvider().layer_norm()
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = GPTModel(config, spec, vocab, 4096, post_process=False, pg_collection=groups)
        parallel_state.destroy_model_parallel()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert experts == 2 * (64 // 8) * 3 * hidden * 1024  # layers, experts here, gate + up + down
    assert model.embedding.word_embeddings.weight.shape == (vocab // 2, hidden)
