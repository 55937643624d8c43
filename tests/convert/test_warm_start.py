"""MTP layers for a trunk without: what they are made of, and that training starts from the weights and goes on."""

from __future__ import annotations

import pytest
import torch

from megatron_mtp.checkpoint.stored import StoredWeights
from megatron_mtp.config import ConfigContainer
from megatron_mtp.convert.exporting import export_hf
from megatron_mtp.convert.hf_config import model_config_from_hf
from megatron_mtp.convert.importing import import_hf
from megatron_mtp.convert.side_files import read_config
from megatron_mtp.errors import CheckpointError, ConversionError
from megatron_mtp.recipes.common import pretrain_common
from tests.convert.hf_models import make
from tests.convert.ours import built
from tests.harness.runs import opened, weights_of

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trunk") / "hf"
    make("qwen3", folder)
    return folder


def tensors(path):
    weights = StoredWeights(path)
    return {
        key: weights.read(key, (0,) * len(weights.shape(key)), weights.shape(key)) for key in sorted(weights.tensors)
    }


def test_the_last_layer_becomes_every_depth(trunk, tmp_path):
    report = import_hf(trunk, tmp_path / "grown", mtp_depths=2, mtp_init="last_layer")
    found = tensors(tmp_path / "grown")
    of_block = {
        key.removeprefix("decoder.layers."): value[-1] for key, value in found.items() if "decoder.layers" in key
    }
    for depth in range(2):
        prefix = f"mtp.layers.{depth}."
        for name, value in of_block.items():
            assert torch.equal(found[f"{prefix}transformer_layer.{name}"], value), name
        assert torch.equal(found[f"{prefix}final_layernorm.weight"], found["decoder.final_layernorm.weight"])
        assert bool((found[f"{prefix}enorm.weight"] == 1).all())
        assert found[f"{prefix}eh_proj.weight"].std() > 0
    assert len(report.made) == 2 * (4 + len(of_block))
    assert not torch.equal(found["mtp.layers.0.eh_proj.weight"], found["mtp.layers.1.eh_proj.weight"])


def model_tensors(source, changes):
    """On a rank: the model's whole tensors as built, before anything is loaded."""
    import torch

    from megatron_mtp.model.build import build_model
    from megatron_mtp.model.sharded import parameter_parts, whole_tensors
    from megatron_mtp.parallel.resolve import resolve

    with built(source, changes) as (cfg, _, groups):
        return whole_tensors(parameter_parts(build_model(resolve(cfg, 1), groups, torch.device("cpu"))))[0]


def test_fresh_layers_are_those_of_a_new_model(trunk, ranks, tmp_path):
    import_hf(trunk, tmp_path / "grown", mtp_depths=1, mtp_init="fresh")
    found = tensors(tmp_path / "grown")
    (new,) = ranks(1).run(model_tensors, str(tmp_path / "grown"), {})
    for key in (key for key in found if key.startswith("mtp.")):
        assert torch.equal(found[key], new[key]), key


def test_dense_depths_for_a_trunk_of_experts(ranks, tmp_path):
    """Attention is copied, the feed-forward block is new, and the export says in config.json what was added."""
    make("qwen3_moe", tmp_path / "hf")
    cfg = pretrain_common()
    cfg.model = model_config_from_hf(read_config(tmp_path / "hf"))
    cfg.model.update(mtp_layer_mlp="dense", mtp_ffn_hidden_size=40, mtp_num_layers=1)
    report = import_hf(tmp_path / "hf", tmp_path / "grown", cfg, mtp_init="last_layer")
    assert any(
        "feed-forward blocks of new MTP layers are initialised as in a new model" in note for note in report.notes
    )
    found = tensors(tmp_path / "grown")
    block = "mtp.layers.0.transformer_layer."
    assert torch.equal(found[f"{block}self_attention.linear_qkv.weight"],
                       found["decoder.layers.self_attention.linear_qkv.weight"][-1])  # fmt: skip
    assert found[f"{block}mlp.linear_fc1.weight"].shape == (80, 32)
    (new,) = ranks(1).run(model_tensors, str(tmp_path / "grown"), {})
    assert {key for key in new if key.startswith("mtp.")} == {key for key in found if key.startswith("mtp.")}
    assert torch.equal(new[f"{block}mlp.linear_fc1.weight"], found[f"{block}mlp.linear_fc1.weight"])
    export_hf(tmp_path / "grown", tmp_path / "back")
    config = read_config(tmp_path / "back")
    assert (config["mtp_layer_mlp"], config["mtp_intermediate_size"]) == ("dense", 40)
    import_hf(tmp_path / "back", tmp_path / "again")
    again = tensors(tmp_path / "again")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[key], found[key]) for key in found)
    assert StoredWeights(tmp_path / "again").config().model.mtp_ffn_hidden_size == 40


def test_missing_layers_are_named_and_nothing_is_written(trunk, tmp_path):
    with pytest.raises(ConversionError, match=r"mtp_num_layers = 1: .* holds no MTP layers.*--mtp-init"):
        import_hf(trunk, tmp_path / "grown", mtp_depths=1)
    assert not (tmp_path / "grown").exists()


def train(source: str, frozen: bool) -> tuple[list[float], list[float], bool]:
    """Five steps on two ranks: main and MTP losses, and whether the trunk kept its bits."""
    from megatron_mtp.checkpoint.preflight import check_run_directory
    from megatron_mtp.training.pretrain import Checkpointer

    cfg = run_config(source, frozen).finalize(2)
    check_run_directory(cfg)
    with opened(cfg) as run:
        engine = run.engine
        Checkpointer(cfg, run.groups).start_from_pretrained(engine.chunks, engine.optimizer)
        before = weights_of(run)
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2
        batch = next(run.data.train(0))
        results = [engine.train(batch, 0.5) for _ in range(5)]
        after = weights_of(run)
        same_trunk = all(torch.equal(before[name], after[name]) for name in before if not name.startswith("mtp."))
        return [r.losses[0] for r in results], [r.losses[1] for r in results], same_trunk


def run_config(source: str, frozen: bool) -> ConfigContainer:
    from megatron_mtp.convert.load import config_of

    cfg = config_of(source)
    cfg.model.mtp_freeze_trunk = frozen
    cfg.model.pipeline_model_parallel_size = 2
    cfg.model.seq_length = 32
    cfg.dataset.mock, cfg.dataset.seq_length = True, None
    cfg.train.train_iters, cfg.train.global_batch_size, cfg.train.micro_batch_size = 5, 4, 2
    cfg.scheduler.lr_warmup_iters = 0
    cfg.ddp.overlap_grad_reduce = cfg.ddp.overlap_param_gather = False
    cfg.dist.device = "cpu"
    cfg.checkpoint.pretrained_checkpoint = source
    return cfg


@pytest.mark.parametrize("frozen", [True, False])
def test_training_starts_from_the_weights(frozen, trunk, ranks, tmp_path):
    """The main loss of the first step is that of the imported model; MTP layers learn, and a frozen trunk stays."""
    import_hf(trunk, tmp_path / "grown", mtp_depths=1, mtp_init="last_layer")
    main, mtp, same_trunk = ranks(2).run(train, str(tmp_path / "grown"), frozen)[0]
    assert mtp[-1] < mtp[0] - 0.1
    assert same_trunk == frozen
    assert (main[-1] == main[0]) == frozen


def test_weights_of_another_model_are_refused(trunk, tmp_path):
    from megatron_mtp.checkpoint.preflight import check_pretrained

    import_hf(trunk, tmp_path / "plain")
    cfg = run_config(str(tmp_path / "plain"), frozen=False)
    cfg.model.mtp_num_layers = 1
    cfg.model.hidden_size = 64
    cfg.finalize(2)
    with pytest.raises(CheckpointError, match=r"hidden_size = 64: the weights are of a model with 32") as refusal:
        check_pretrained(cfg)
    assert "model.mtp_new_layers_init = fresh, last_layer" in str(refusal.value)
