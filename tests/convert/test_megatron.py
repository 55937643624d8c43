"""Checkpoints of Megatron-Core's own classes open here, and ours there, with equal logits at every depth."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.convert.megatron import import_megatron
from megatron_mtp.convert.megatron_export import export_megatron
from megatron_mtp.errors import ConversionError
from megatron_mtp.recipes import get_recipe
from tests.convert import upstream
from tests.convert.hf_models import tokens
from tests.convert.ours import logits

pytestmark = pytest.mark.dist
IDS = tokens(2, upstream.SEQ, upstream.VOCAB)
FAST = ("moe",)
KINDS = [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in upstream.KINDS]


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """kind -> (run directory that Megatron-Core saved, its logits), made once."""
    known = {}

    def get(kind):
        if kind not in known:
            run = tmp_path_factory.mktemp(kind) / "theirs"
            common = {"args": upstream.arguments(kind), "iteration": 6, "checkpoint_version": 3.0}
            (expected,) = ranks(1).run(upstream.save, kind, str(run), IDS, common)
            known[kind] = (run, expected)
        return known[kind]

    return get


def worst(ours, theirs):
    """Largest difference where depth k has a token k ahead; upstream's roll fills the end with zeros."""
    return max(float((ours[k, :, : upstream.SEQ - k] - theirs[k, :, : upstream.SEQ - k]).abs().max()) for k in range(3))


@pytest.mark.parametrize("kind", KINDS)
def test_theirs_opens_here_and_ours_opens_there(kind, saved, ranks, tmp_path):
    run, expected = saved(kind)
    report = import_megatron(run, tmp_path / "ours")
    assert "args" not in report.left_out
    (got,) = ranks(1).run(logits, str(tmp_path / "ours"), IDS, {})
    assert got.shape == expected.shape
    assert expected.std() > 0.01
    assert worst(got, expected) < 1e-5
    export_megatron(tmp_path / "ours", tmp_path / "back", spec="local")
    assert (tmp_path / "back" / "latest_checkpointed_iteration.txt").read_text() == "release"
    ((back, common),) = ranks(1).run(upstream.load, kind, str(tmp_path / "back" / "release"), IDS)
    assert torch.equal(back, expected)
    assert vars(common["args"])["mtp_num_layers"] == upstream.DEPTHS
    again = import_megatron(tmp_path / "back", tmp_path / "again")
    assert again.written == report.written


def test_the_checkpoint_says_what_the_model_is(saved, tmp_path):
    run, _ = saved("moe")
    import_megatron(run, tmp_path / "ours")
    model = StoredWeights(tmp_path / "ours").config().model
    assert (model.num_moe_experts, model.moe_router_topk, model.moe_router_score_function) == (4, 2, "sigmoid")
    assert (model.mtp_num_layers, model.vocab_size, model.layernorm_epsilon) == (upstream.DEPTHS, upstream.VOCAB, 1e-6)
    assert model.qk_layernorm
    assert model.moe_router_enable_expert_bias
    assert not model.share_embeddings_and_output_weights


def test_a_run_config_of_megatron_bridge_is_read(saved, tmp_path):
    run, _ = saved("moe")
    shutil.copytree(run, tmp_path / "bridge")
    values = {**upstream.KINDS["moe"], "vocab_size": upstream.VOCAB, "seq_length": upstream.SEQ, "rotary_base": 10000}
    values |= {"activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False}}
    values |= {"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", "position_embedding_type": "rope"}
    values |= {"share_embeddings_and_output_weights": False, "tensor_model_parallel_size": 8}
    (tmp_path / "bridge" / "iter_0000006" / "run_config.yaml").write_text(yaml.safe_dump({"model": values}))
    import_megatron(tmp_path / "bridge" / "iter_0000006", tmp_path / "one")
    import_megatron(run, tmp_path / "two")
    one, two = (StoredWeights(tmp_path / name).config().model for name in ("one", "two"))
    assert one == two


def test_an_older_common_file_is_read_and_nothing_in_it_is_run(saved, tmp_path):
    run, _ = saved("moe")
    shutil.copytree(run, tmp_path / "old")

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    common = {"args": upstream.arguments("moe", other=Bomb(), dtype=torch.bfloat16), "iteration": 6}
    torch.save(common, tmp_path / "old" / "iter_0000006" / "common.pt")
    import_megatron(tmp_path / "old", tmp_path / "ours")
    assert not (tmp_path / "exploded").exists()
    assert StoredWeights(tmp_path / "ours").config().model.num_moe_experts == 4


def arguments_of(run: Path, target: Path, arguments: Namespace | None) -> Path:
    """A copy of a run whose older common file holds other arguments."""
    shutil.copytree(run, target)
    torch.save({"args": arguments, "iteration": 6}, target / "iter_0000006" / "common.pt")
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"has shape \[.*\], the model needs \[.*\]"),
        ({"mtp_num_layers": 1}, r"mtp\.layers\.1\..* has no place in the model"),
        ({"mtp_num_layers": 3}, r"mtp\.layers\.2\..* is missing"),
        ({"qk_layernorm": False}, r"q_layernorm\.weight has no place"),
        ({"vocab_size": 129, "padded_vocab_size": 256}, r"word_embeddings\.weight has shape \[128, 32\]"),
        ({"position_embedding_type": "mrope"}, "position_embedding_type = 'mrope'"),
        ({"moe_layer_freq": "exec(1)"}, "moe_layer_freq = 'exec.1.'"),
    ],
)
def test_what_does_not_fit_is_named(changes, message, saved, tmp_path):
    run = arguments_of(saved("moe")[0], tmp_path / "run", upstream.arguments("moe", **changes))
    with pytest.raises(ConversionError, match=message):
        import_megatron(run, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_is_no_torch_dist_checkpoint_is_named(saved, tmp_path):
    run, _ = saved("moe")
    with pytest.raises(ConversionError, match="holds neither latest_checkpointed_iteration"):
        import_megatron(tmp_path, tmp_path / "ours")
    with pytest.raises(ConversionError, match="Name the model with --recipe"):
        import_megatron(arguments_of(run, tmp_path / "bare", None), tmp_path / "ours")
    with pytest.raises(ConversionError, match="holds no optimizer state"):
        import_megatron(run, tmp_path / "ours", upstream.settings("moe"), with_optimizer=True)
    with pytest.raises(ConversionError, match="--with-optimizer: needs --recipe"):
        import_megatron(run, tmp_path / "ours", with_optimizer=True)
    with pytest.raises(ConversionError, match=r"model\.hidden_size: the recipe has 64, the checkpoint 32"):
        import_megatron(run, tmp_path / "ours", get_recipe("tiny_moe"))
    import_megatron(run, tmp_path / "ours")
    with pytest.raises(ConversionError, match="no conversion is needed"):
        import_megatron(tmp_path / "ours", tmp_path / "other")
    shutil.copytree(run, tmp_path / "zarr")
    (tmp_path / "zarr" / "iter_0000006" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ConversionError, match="'zarr'; only torch_dist is read"):
        import_megatron(tmp_path / "zarr", tmp_path / "other")


@pytest.mark.parametrize("kind", ["dense", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("tied", "moe"))])
def test_a_run_of_theirs_goes_on_here(kind, ranks, tmp_path):
    """Their optimizer, stopped after two of five steps and continued here, ends at the same bits.

    Gradients are drawn by name, and the local spec has another name for the norm before experts.
    """
    (expected,) = ranks(1).run(upstream.train, kind, str(tmp_path / "theirs"), 2, 5)
    import_megatron(tmp_path / "theirs", tmp_path / "ours", upstream.settings(kind), with_optimizer=True)
    ((start, got),) = ranks(1).run(upstream.go_on, kind, str(tmp_path / "ours"), 5)
    assert start == 2
    assert got.keys() == expected.keys()
    compared = [name for name in got if kind != "moe" or "mlp.linear_fc1.layer_norm_weight" not in name]
    assert len(compared) > 20
    assert [name for name in compared if not torch.equal(got[name], expected[name])] == []
