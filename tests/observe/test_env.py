"""Which variables are recorded, and that secrets are redacted."""

from __future__ import annotations

import pytest

from megatron_mtp.observe.env import effective_environment, redact

pytestmark = pytest.mark.unit


def test_variables_that_change_results_or_speed_are_kept():
    environ = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NCCL_ALGO": "Ring",
        "OMP_NUM_THREADS": "1",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
        "NVTE_FUSED_ATTN": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHELASTIC_RUN_ID": "none",
        "HOME": "/home/someone",
        "WANDB_API_KEY": "secret",
        "MASTER_ADDR": "host",
    }
    assert effective_environment(environ) == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NCCL_ALGO": "Ring",
        "NVTE_FUSED_ATTN": "0",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "abc"),
        ("NCCL_SECRET", "x"),
        ("MY_PASSWORD", "x"),
        ("SOMETHING", "hf_abcdefghij"),
        ("SOMETHING", "0123456789abcdef0123456789abcdef01234567"),
    ],
)
def test_secrets_are_hidden(name: str, value: str):
    assert redact(name, value) == "<hidden>"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_IB_HCA", "mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4"),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
        ("OMP_NUM_THREADS", "8"),
    ],
)
def test_settings_are_not_hidden(name: str, value: str):
    assert redact(name, value) == value


def test_a_password_in_an_address_is_hidden():
    assert redact("HTTP_PROXY", "http://me:pw@proxy:8080") == "http://<hidden>@proxy:8080"
