"""Derived values, every rule across fields, all problems at once, and never another error than ConfigError."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.coerce import field_types
from megatron_mtp.config.hints import hints
from megatron_mtp.config.overrides import apply_overrides
from megatron_mtp.config.sections import section_types
from megatron_mtp.errors import ConfigError, UnsupportedError
from megatron_mtp.recipes import RECIPES, get_recipe

pytestmark = pytest.mark.unit


def problems_of(recipe: str, *overrides: str, world_size: int | None = None) -> str:
    cfg = get_recipe(recipe)
    apply_overrides(cfg, list(overrides))
    with pytest.raises(ConfigError) as caught:
        cfg.finalize(world_size)
    return str(caught.value)


def finalized(recipe: str, *overrides: str, world_size: int | None = None) -> ConfigContainer:
    cfg = get_recipe(recipe)
    apply_overrides(cfg, list(overrides))
    return cfg.finalize(world_size)


def test_derived_values():
    cfg = ConfigContainer()
    cfg.model.num_layers, cfg.model.hidden_size, cfg.model.num_attention_heads = 2, 48, 4
    cfg.model.vocab_size, cfg.model.num_moe_experts, cfg.model.sequence_parallel = 100, 4, True
    cfg.train.train_tokens, cfg.train.global_batch_size = "1.5M", 6
    cfg.finalize()
    model = cfg.model
    assert (model.ffn_hidden_size, model.moe_ffn_hidden_size) == (192, 192)
    assert (model.num_query_groups, model.kv_channels, model.mtp_num_layers) == (4, 12, 0)
    assert model.expert_tensor_parallel_size == 1
    assert model.virtual_pipeline_model_parallel_size == 1
    assert model.sequence_parallel is False
    assert cfg.train.train_tokens == 1_500_000
    assert cfg.train.train_iters is None
    assert (cfg.dataset.seq_length, cfg.tokenizer.vocab_size) == (4096, 100)
    assert (cfg.validation.eval_micro_batch_size, cfg.validation.eval_global_batch_size) == (1, 6)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (["logger.wandb_project=p", "checkpoint.save=runs/mine/"], "mine"),
        (["logger.wandb_project=p", "checkpoint.save=runs/mine", "logger.wandb_exp_name=other"], "other"),
        (["checkpoint.save=runs/mine"], None),
    ],
)
def test_a_run_in_wandb_is_named_after_its_directory(changes: list[str], name: str | None):
    cfg = get_recipe("tiny_dense")
    apply_overrides(cfg, changes)
    assert cfg.finalize().logger.wandb_exp_name == name


def test_finalize_freezes_and_copy_thaws():
    cfg = finalized("tiny_dense")
    with pytest.raises(ConfigError, match="finalized"):
        cfg.model.num_layers = 8
    with pytest.raises(ConfigError, match="finalized"):
        cfg.model = cfg.model.copy()
    other = cfg.copy()
    other.model.num_layers = 8
    other.model.mcore["fp32_residual_connection"] = True
    assert cfg.model.num_layers == 4
    assert cfg.model.mcore == {}
    assert other.finalize().model.num_layers == 8


def test_a_failed_finalize_changes_nothing():
    cfg = get_recipe("tiny_dense")
    cfg.train.train_iters = None
    before = cfg.copy()
    with pytest.raises(ConfigError):
        cfg.finalize()
    assert cfg == before
    cfg.train.train_iters = 3
    cfg.finalize()


def test_a_finalized_config_can_be_checked_for_another_world():
    cfg = finalized("tiny_dense", "model.tensor_model_parallel_size=2")
    assert cfg.finalize(world_size=4) is cfg
    with pytest.raises(ConfigError, match="world_size = 3"):
        cfg.finalize(world_size=3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_valid_and_finalizing_twice_changes_nothing(recipe):
    cfg = get_recipe(recipe).finalize()
    assert cfg.copy().finalize() == cfg


BAD = [
    ("tiny_dense", ["model.num_attention_heads=6"],
     "model.hidden_size = 64: must be divisible by model.num_attention_heads"),
    ("tiny_dense", ["model.tensor_model_parallel_size=3"], "model.num_attention_heads = 4: must be divisible by"),
    ("tiny_dense", ["model.tensor_model_parallel_size=8", "model.num_attention_heads=8", "model.num_query_groups=3"],
     "multiple or a divisor"),
    ("tiny_dense", ["model.num_layers=1", "model.pipeline_model_parallel_size=5"], "no stage may be empty"),
    ("tiny_dense", ["model.seq_length=66", "model.context_parallel_size=2"],
     "divisible by 2 x model.context_parallel_size = 2"),
    ("tiny_dense", ["model.seq_length=62", "model.tensor_model_parallel_size=4", "model.sequence_parallel=true"],
     "under model.sequence_parallel"),
    ("tiny_dense", ["train.global_batch_size=7"], "7: must be divisible by train.micro_batch_size = 2"),
    ("tiny_moe", ["model.expert_model_parallel_size=3"], "model.num_moe_experts = 8: must be divisible by"),
    ("tiny_moe", ["model.tensor_model_parallel_size=2"], "with sequence parallelism only"),
    ("tiny_dense", ["model.expert_model_parallel_size=2"], "needs experts"),
    ("tiny_dense", ["model.position_embedding_type=learned_absolute"], "read the token k ahead at position i"),
    ("tiny_dense", ["model.mtp_loss_scaling_factor=-0.1"], "-0.1: must be at least 0"),
    ("tiny_dense", ["model.mtp_loss_scaling_factor=.nan"], "nan: must be finite"),
    ("tiny_dense", ["model.mtp_loss_scaling_factor=inf"], "finite number that is not negative"),
    ("tiny_dense", ["model.mtp_loss_scaling_factor=often"], "must be a number such as 0.1"),
    ("tiny_dense", ["model.mtp_loss_scaling_factor=inf@0"], "finite number that is not negative"),
    ("tiny_dense", ["model.mtp_variant=Sequential"], "Did you mean sequential?"),
    ("tiny_dense", ["model.mtp_depth_weights=[1.0]"],
     "must hold one weight for each depth of model.mtp_num_layers = 2"),
    ("tiny_dense", ["model.mtp_depth_weights=[1.0, -1]"], "must be at least 0"),
    ("tiny_dense", ["model.mtp_num_layers=-1"], "model.mtp_num_layers = -1: must be at least 0"),
    ("tiny_dense", ["model.mtp_num_layers=64"], "must be above model.mtp_num_layers"),
    ("tiny_dense", ["model.mtp_num_layers=0", "model.mtp_freeze_trunk=true"], "nothing would be trained"),
    ("tiny_dense", ["model.mtp_variant=parallel", "model.mtp_use_repeated_layer=true"], "same hidden state"),
    ("tiny_dense", ["model.pipeline_model_parallel_layout=[2, 3]", "model.pipeline_model_parallel_size=2"],
     "places 5 decoder"),
    ("tiny_dense", ["model.virtual_pipeline_model_parallel_size=2"], "interleaved schedule needs"),
    ("tiny_dense", ["model.num_layers=0"], "model.num_layers = 0: must be at least 1"),
    ("tiny_dense", ["train.train_samples=5"], "train.train_samples = 5 is set too"),
    ("tiny_dense", ["train.train_iters=null"], "none is set"),
    ("tiny_dense", ["train.train_iters=null", "train.exit_duration_in_mins=5"], "a decay needs a length"),
    ("tiny_dense", ["train.train_iters=null", "train.exit_duration_in_mins=5", "scheduler.lr_decay_style=constant",
     "scheduler.lr_warmup_fraction=0.1", "scheduler.lr_warmup_iters=0"], "a decay needs a length"),
    ("tiny_dense", ["train.train_iters=null", "train.exit_duration_in_mins=5", "scheduler.lr_decay_iters=50",
     "scheduler.start_weight_decay=0.1", "scheduler.end_weight_decay=0.2",
     "scheduler.weight_decay_incr_style=linear"], "weight decay moves over the complete run"),
    ("tiny_dense", ["train.train_iters=null", "train.train_tokens=many"], "train.train_tokens = 'many'"),
    ("tiny_dense", ["train.rampup_batch_size=[2, 4, 10]"], "do not reach train.global_batch_size = 8 exactly"),
    ("tiny_dense", ["train.rampup_batch_size=[3, 5, 10]"], "size 3 must be divisible by train.micro_batch_size"),
    ("tiny_dense", ["train.rampup_batch_size=[16, 2, 10]"], "starts above"),
    ("tiny_dense", ["train.rampup_batch_size=[2, 2]"], "must be [start, increment, samples]"),
    ("tiny_dense", ["scheduler.lr_decay_samples=100"], "in iters and samples at once"),
    ("tiny_dense", ["scheduler.lr_decay_iters=10"],
     "lr_warmup_iters = 10: must be below scheduler.lr_decay_iters = 10"),
    ("tiny_dense", ["scheduler.lr_decay_style=WSD"], "needs the length of its last phase"),
    ("tiny_dense", ["scheduler.lr_wsd_decay_iters=3"], "has no effect"),
    ("tiny_dense", ["scheduler.lr_warmup_fraction=0.1"], "a warmup length is given too"),
    ("tiny_dense", ["scheduler.start_weight_decay=0.1"], "set together with scheduler.end_weight_decay"),
    ("tiny_dense", ["optimizer.min_lr=1"], "must not be above optimizer.lr"),
    ("tiny_dense", ["optimizer.lr=.inf"], "optimizer.lr = inf: must be finite"),
    ("tiny_dense", ["optimizer.adam_beta2=1"], "at least 0 and below 1"),
    ("tiny_dense", ["ddp.overlap_param_gather=true"], "needs ddp.use_distributed_optimizer"),
    ("tiny_dense", ["model.num_layers=1000", "model.pipeline_model_parallel_size=8",
                    "model.virtual_pipeline_model_parallel_size=100"], "here are 800 chunks on"),
    ("tiny_dense", ["model.num_layers=6", "model.pipeline_model_parallel_size=3",
                    "model.virtual_pipeline_model_parallel_size=2"], "makes 4 micro-batches; the interleaved schedule"),
    ("tiny_dense", ["optimizer.optimizer=muon"], "optimizer.optimizer = 'muon': Muon reads complete matrices of "
     "gradients, and ddp.use_distributed_optimizer = True leaves each rank the sum of its own shard only. Set "
     "ddp.use_distributed_optimizer = False"),
    ("tiny_dense", ["optimizer.optimizer=muon", "ddp.use_distributed_optimizer=false", "precision.dtype=fp16"],
     "Megatron-Core has no Muon for precision.dtype = 'fp16'"),
    ("tiny_dense", ["model.mcore.tp_comm_overlap=true"], "made by Megatron-LM's training script only"),
    ("tiny_moe", ["model.mcore.moe_enable_deepep=true"], "it belongs to the flex dispatcher"),
    ("tiny_moe", ["model.mcore.moe_hybridep_num_sms=8"], "it belongs to the flex dispatcher"),
    ("tiny_moe", ["model.mcore.moe_flex_dispatcher_backend=hybridep"], "it belongs to the flex dispatcher"),
    ("tiny_moe", ["model.moe_token_dispatcher_type=flex"], "Use 'alltoall'"),
    ("tiny_mla_moe", ["model.rope_type=yarn", "model.beta_fast=1", "model.beta_slow=2"],
     "must be above model.beta_slow = 2"),
    ("tiny_mla_moe", ["model.mscale_all_dim=0.7"], "belongs to model.rope_type = 'yarn'"),
    ("tiny_dense", ["ddp.use_torch_fsdp2=true"], "fully sharded data parallelism is not supported"),
    ("tiny_dense", ["precision.loss_scale=128"], "only fp16 scales the loss"),
    ("tiny_dense", ["dataset.seq_length=32"], "must equal model.seq_length = 64"),
    ("tiny_dense", ["dataset.blend=[[a, b], [1.0]]"], "2 prefixes and 1 weights"),
    ("tiny_dense", ["dataset.blend=[[a], [-1.0]]"], "must be finite and above 0"),
    ("tiny_dense", ["dataset.blend=[a, 1]"], "dataset.blend = ['a', 1]: must be"),
    ("tiny_dense", ["dataset.blend=[a]", "dataset.mock=true"], "a blend is given too"),
    ("tiny_dense", ["dataset.blend_per_split=[[a], null]"], "needs three"),
    ("tiny_dense", ["dataset.blend_per_split=[null, [a], null]"], "needs three"),
    ("tiny_dense", ["dataset.blend=[a]", "dataset.split=9,1"], "must be three shares"),
    ("tiny_dense", ["dataset.valid_sets.code=[]"], "dataset.valid_sets.code = []"),
    ("tiny_dense", ["tokenizer.tokenizer_type=huggingface"], "needs tokenizer.tokenizer_model"),
    ("tiny_dense", ["model.vocab_size=null"], "needs model.vocab_size"),
    ("tiny_dense", ["tokenizer.vocab_size=600"], "must not be above model.vocab_size = 512"),
    ("tiny_dense", ["tokenizer.tokenizer_type=bytes", "model.vocab_size=256"], "needs 257"),
    ("tiny_dense", ["logger.wandb_project=p"], "needs logger.wandb_exp_name"),
    ("tiny_dense", ["checkpoint.most_recent_k=0"], "must be -1 (all) or at least 1"),
    ("tiny_dense", ["checkpoint.exit_on_missing_checkpoint=true"], "needs checkpoint.load"),
    ("tiny_dense", ["profiling.use_pytorch_profiler=true"], "needs profiling.profile_dir"),
    ("tiny_dense", ["model.recompute_granularity=full"], "needs model.recompute_method"),
    ("tiny_dense", ["model.recompute_method=uniform"], "needs model.recompute_granularity"),
    ("tiny_dense", ["model.recompute_granularity=selective", "model.recompute_num_layers=1"],
     "belongs to model.recompute_granularity = 'full'"),
    ("tiny_dense", ["model.recompute_granularity=selective", "model.recompute_modules=[moe, attn, mla_up_proj]"],
     "there is no 'attn'"),
    ("tiny_dense", ["model.moe_ffn_hidden_size=64"], "there are no experts"),
    ("tiny_dense", ["model.mtp_layer_mlp=dense"], "there are no experts"),
    ("tiny_moe", ["model.mtp_ffn_hidden_size=64"], "needs model.mtp_layer_mlp = 'dense'"),
    ("tiny_moe", ["model.mtp_layer_mlp=dense", "model.mtp_ffn_hidden_size=65", "model.tensor_model_parallel_size=2"],
     "model.mtp_ffn_hidden_size = 65: must be divisible by model.tensor_model_parallel_size = 2"),
    ("tiny_moe", ["model.moe_layer_freq=[0, 1]"], "With the first 1 dense: [0, 1, 1, 1]"),
    ("tiny_moe", ["model.moe_router_topk=9"], "must not be above model.num_moe_experts = 8"),
    ("tiny_moe", ["model.moe_router_score_function=softmax"], "needs model.moe_router_score_function = 'sigmoid'"),
    ("tiny_moe", ["model.moe_aux_loss_coeff=0.1"], "has no effect with"),
    ("tiny_moe", ["model.moe_router_num_groups=3", "model.moe_router_group_topk=1"],
     "must divide model.num_moe_experts"),
    ("tiny_moe", ["model.moe_router_num_groups=4", "model.moe_router_group_topk=3"], "must be from 3 to 6 with"),
    ("tiny_moe", ["model.moe_router_num_groups=4"], "set together with model.moe_router_group_topk"),
    ("tiny_mla_moe", ["model.num_query_groups=2"], "has no groups"),
    ("tiny_mla_moe", ["model.position_embedding_type=none"], "Use 'rope'"),
    ("tiny_moe", ["model.backend=torch", "model.moe_grouped_gemm=true", "model.moe_ffn_hidden_size=20"],
     "takes widths that are multiples of 8"),
    ("tiny_moe", ["model.backend=torch", "model.moe_grouped_gemm=true", "model.recompute_granularity=selective",
                  "model.recompute_modules=[moe_act]"], "'moe_act' needs Transformer Engine"),
    ("tiny_dense", ["model.backend=torch", "model.mcore.fp8=e4m3"], "FP8 training"),
    ("tiny_dense", ["model.backend=torch", "model.mcore.fp4=e2m1"], "FP4 training"),
    ("tiny_dense", ["model.backend=torch", "model.mcore.cuda_graph_impl=local"], "CUDA graphs"),
    ("tiny_dense", ["model.mcore.bf16=true"], "Use precision.dtype"),
    ("tiny_dense", ["model.mcore.num_layers=3"], "Set model.num_layers instead"),
    ("tiny_dense", ["model.mcore.softmax_scal=3"], "Did you mean softmax_scale?"),
    ("tiny_dense", ["model.mcore.softmax_scale=wide"], "must be a number or null"),
    ("tiny_dense", ["model.mcore.fp8_quantizer_factory=os.system"], "may not name code to run"),
    ("tiny_dense", ["model.mcore.batch_p2p_comm=true"], "it is set when the model is built"),
    ("tiny_dense", ["model.mcore.grad_scale_func=f"], "no value can be given"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "overrides", "words"), BAD, ids=[" ".join(case[1]) for case in BAD])
def test_rules_across_fields(recipe, overrides, words):
    assert words in problems_of(recipe, *overrides)


def test_all_problems_at_once_each_once():
    text = problems_of(
        "tiny_dense",
        "model.num_attention_heads=6",
        "model.hidden_size=-1",
        "train.global_batch_size=7",
        "ddp.use_megatron_fsdp=true",
        "optimizer.lr=0",
        "model.mcore.foo=1",
    )
    lines = text.splitlines()
    assert len(lines) == len(set(lines))
    for words in (
        "model.hidden_size = -1",
        "global_batch_size = 7",
        "use_megatron_fsdp",
        "optimizer.lr = 0",
        "mcore.foo",
    ):
        assert words in text


def test_a_run_may_end_by_wall_clock_time_alone():
    cfg = finalized(
        "tiny_dense", "train.train_iters=null", "train.exit_duration_in_mins=5", "scheduler.lr_decay_style=constant"
    )
    assert cfg.train.is_frozen
    assert cfg.train.train_iters is None


def test_only_refusals_are_unsupported_errors():
    cfg = get_recipe("tiny_dense")
    cfg.model.position_embedding_type = "learned_absolute"
    with pytest.raises(UnsupportedError):
        cfg.finalize()
    cfg.model.mtp_num_layers = 0
    cfg.finalize()


def test_wrong_types_set_in_python_are_found_with_the_rest():
    cfg = get_recipe("tiny_dense")
    cfg.model.num_layers = "8"
    cfg.optimizer.lr = "fast"
    cfg.model.attention_dropout = None
    cfg.train.global_batch_size = 7
    cfg.dataset = None
    with pytest.raises(ConfigError) as caught:
        cfg.finalize()
    assert "dataset = None: must be a DatasetConfig" in str(caught.value)
    cfg.dataset = ConfigContainer().dataset
    with pytest.raises(ConfigError) as caught:
        cfg.finalize()
    assert str(caught.value).splitlines() == [
        "model.num_layers = '8': must be an integer.",
        "model.attention_dropout = None: must be a number.",
        "optimizer.lr = 'fast': must be a number.",
        "train.global_batch_size = 7: must be divisible by train.micro_batch_size = 2; 8 would be.",
    ]


WORLD = [
    (["model.tensor_model_parallel_size=2"], 3, "world_size = 3: must be a multiple of 2"),
    ([], 0, "world_size = 0: must be above 0"),
    ([], -5, "world_size = -5: must be above 0"),
    ([], 10**400, "world_size = 1000"),
    (["train.global_batch_size=6"], 2, "train.micro_batch_size = 2 x 2 data parallel ranks = 4; 8 would be"),
    (["train.rampup_batch_size=[2, 2, 9]"], 2, "size 2 must be divisible"),
    (["validation.eval_global_batch_size=2"], 2, "validation.eval_global_batch_size = 2: must be divisible"),
    (["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2",
     "train.global_batch_size=12"], 4,
     "makes 3 micro-batches for each rank; the interleaved schedule"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "world_size", "words"), WORLD)
def test_rules_of_the_world_size(overrides, world_size, words):
    finalized("tiny_dense", *overrides)
    assert words in problems_of("tiny_dense", *overrides, world_size=world_size)


def test_dense_and_expert_grids_must_both_fit():
    overrides = ["model.expert_model_parallel_size=4", "model.context_parallel_size=2"]
    finalized("tiny_moe", *overrides, world_size=4)
    assert "world_size = 2: must be a multiple of 4" in problems_of("tiny_moe", *overrides, world_size=2)


@pytest.mark.parametrize("world_size", [None, 4])
def test_pipeline_groups_of_dense_parts_and_experts_must_be_the_same(world_size):
    overrides = ["dist.use_tp_pp_dp_mapping=true", "model.pipeline_model_parallel_size=2"]
    finalized("tiny_moe", *overrides, world_size=world_size)
    finalized("tiny_moe", overrides[0], "model.expert_model_parallel_size=2", world_size=world_size)
    found = problems_of("tiny_moe", *overrides, "model.expert_model_parallel_size=2", world_size=world_size)
    assert "dist.use_tp_pp_dp_mapping = True: needs as many data parallel ranks" in found
    assert "model.expert_tensor_parallel_size = 1 x model.expert_model_parallel_size = 2" in found


def test_one_gpu_version_of_a_cluster_recipe_needs_only_sizes():
    cfg = get_recipe("qwen3_30b_a3b")
    cfg.model.num_layers, cfg.model.mtp_num_layers, cfg.train.train_iters = 8, 1, 2
    cfg.model.tensor_model_parallel_size = cfg.model.pipeline_model_parallel_size = 1
    cfg.model.expert_model_parallel_size = 1
    cfg.finalize(world_size=1)
    assert any("before the learning rate reaches its peak" in hint for hint in hints(cfg))


HINTED = [
    (["model.mtp_num_layers=3"], "published pretraining runs use 1 or 2"),
    (["model.mtp_loss_scaling_factor=0.5"], "outside the usual"),
    (["model.mtp_loss_scaling_factor=0.3@0,0.01@1B"], "outside the usual"),
    (["model.hidden_dropout=0.1"], "the curve depends on the layout"),
    (["optimizer.clip_grad=0"], "not clipped"),
    (["optimizer.lr=1"], "published runs use 1e-5 to 6e-3"),
    (["model.mtp_depth_weights=[0, 0]"], "not trained"),
]


@pytest.mark.parametrize(("overrides", "words"), HINTED)
def test_hints(overrides, words):
    assert words in " ".join(hints(finalized("tiny_dense", *overrides)))
    assert words not in " ".join(hints(finalized("tiny_dense")))


def test_moe_hints():
    found = " ".join(hints(finalized("tiny_moe", "model.moe_expert_capacity_factor=1.5")))
    assert "which tokens are dropped" in found
    assert "within each micro-batch" in " ".join(hints(get_recipe("qwen3_30b_a3b").finalize()))


def test_mtp_off_has_no_mtp_hints():
    assert not any("mtp" in hint for hint in hints(finalized("tiny_dense", "model.mtp_num_layers=0")))


FIELDS = [(section, name) for section, kind in section_types().items() for name in field_types(kind) if name != "mcore"]
NUMBERS = [0, 1, 2, 3, 7, 64, -1, 0.0, 0.5, -2.5, math.nan, math.inf]
TEXTS = ["", "x", "10B", "auto", "rope", "none"]
OTHERS = [None, True, False, [], [1, 1], [2, 2, 2, 2], [["a"], None], {}, {"a": ["b"]}, object()]
VALUES = st.sampled_from([*NUMBERS, *TEXTS, *OTHERS])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(["tiny_dense", "tiny_mla_moe"]),
    st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), max_size=4),
    st.sampled_from([None, 0, 1, 2, 6]),
)
def test_any_values_end_in_a_config_or_a_config_error(recipe, assignments, world_size):
    cfg = get_recipe(recipe)
    for (section, name), value in assignments:
        setattr(getattr(cfg, section), name, value)
    # any other error fails the test; a valid config must also get its hints
    with contextlib.suppress(ConfigError):
        hints(cfg.finalize(world_size))
