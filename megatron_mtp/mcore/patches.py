"""Every change to Megatron-Core, to torch and to the process: what, why, for how long, and the test for it.

Importing a module changes nothing. A change lasts as long as its scope says; `replaced` makes it and takes it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

MCORE_VERSIONS = "0.19"
"""Versions of Megatron-Core for which the table was checked, by their beginning."""

Scope = Literal["layout", "facade", "building", "call", "object", "process"]
"""layout: from the making of the process groups to their destruction. facade: while a process works on the CPU or the
meta device. building: while one model or optimizer is built. call: during one call, then taken back. object: on one
object that this project built. process: from an explicit call on, for good."""


@dataclass(frozen=True, slots=True)
class Patch:
    """One change.

    Attributes:
        target: what is changed, by its name upstream; several names of one owner are joined by |.
        where: file under megatron_mtp/ that makes the change.
        scope: how long it lasts.
        reason: what is wrong without it.
        test: what fails without it: a function, or a file where many of its tests do.
    """

    target: str
    where: str
    scope: Scope
    reason: str
    test: str


# fmt: off
# A row: what, where, for how long; why; the test.
PATCHES = (
    Patch("megatron.core.tensor_parallel.CheckpointWithoutOutput", "mcore/recompute.py", "layout",
          "selective recomputation ends in a NameError without Transformer Engine",
          "tests/numerics/test_upstream.py::test_recomputation_covers_mtp_layers_and_changes_no_gradient"),
    Patch("torch.distributed.new_group", "mcore/groups.py", "building",
          "on gloo each of about thirty groups has two polling threads; groups over the same ranks are made once",
          "tests/mcore/test_groups.py::test_gloo_groups_over_the_same_ranks_are_one"),
    Patch("megatron.core.optimizer.DistributedOptimizer", "mcore/optimizer.py", "building",
          "its state is saved at wrong offsets after a padded bucket, and without the step of torch's Adam",
          "tests/checkpoint/test_reshard.py::test_resume_gives_the_weights_of_a_run_that_was_never_stopped"),
    Patch("megatron.core.optimizer.distrib_optimizer.gc", "mcore/optimizer.py", "call",
          "each save collects the garbage of the whole process, which stops training longer than the copy of the state",
          "tests/checkpoint/test_async.py::test_a_save_collects_no_garbage"),
    Patch("MegatronOptimizer.init_state_fn", "mcore/optimizer.py", "object",
          "it leaves out the step of torch's Adam, and does not exist for SGD",
          "tests/checkpoint/test_resume.py::test_resume_is_bit_equal"),
    Patch("megatron.core.distributed.param_and_grad_buffer.dist_all_gather_func | dist_reduce_scatter_func",
          "mcore/collectives.py", "layout",
          "a rank that is alone in its data-parallel group copies all gradients and weights to where they are",
          "tests/mcore/test_optimizer.py::test_a_rank_alone_copies_no_buffer"),
    Patch("megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda", "mcore/main_grad.py", "layout",
          "on a CPU each weight's gradient is made beside DDP's buffer and then added to it",
          "tests/mcore/test_main_grad.py::test_nothing_as_large_as_the_weights_is_made_beside_the_buffer"),
    Patch("ColumnParallelLinear.gradient_accumulation_fusion | RowParallelLinear.gradient_accumulation_fusion",
          "mcore/main_grad.py", "object", "as fused_weight_gradient_mlp_cuda",
          "tests/mcore/test_main_grad.py::test_nothing_as_large_as_the_weights_is_made_beside_the_buffer"),
    Patch("megatron.core.tensor_parallel.VocabParallelEmbedding", "mcore/main_grad.py", "building",
          "the gradient of an embedding has as many rows as the vocabulary, for each depth that looks tokens up",
          "tests/mcore/test_main_grad.py::test_nothing_as_large_as_the_weights_is_made_beside_the_buffer"),
    Patch("megatron.core.tensor_parallel.layers.F", "mcore/main_grad.py", "call",
          "as VocabParallelEmbedding, which calls `F.embedding`",
          "tests/mcore/test_main_grad.py::test_nothing_as_large_as_the_weights_is_made_beside_the_buffer"),
    Patch("megatron.core.optimizer.clip_grads.multi_tensor_scale_impl", "mcore/optimizer.py", "call",
          "without Apex or Transformer Engine every gradient is scaled into a copy, which is copied back",
          "tests/mcore/test_optimizer.py::test_a_rank_alone_copies_no_buffer"),
    Patch("torch.optim.Adam.param_groups | load_state_dict (post-hook)", "mcore/optimizer.py", "object",
          "Megatron-Core leaves torch's Adam in a form that takes three to four times as long as the fused one",
          "tests/mcore/test_optimizer.py::test_adam_is_fused_before_and_after_a_load"),
    Patch("ChainedOptimizer.get_grad_norm | step_with_ready_grads", "mcore/optimizer.py", "call",
          "an update with a norm that is not finite is applied, except under fp16",
          "tests/training/guards/test_faults.py::test_a_gradient_that_is_not_finite_is_found_though_all_losses_are"),
    Patch("megatron.core.pipeline_parallel.schedules.forward_step | backward_step", "mcore/schedules.py", "call",
          "a profile times what a pipeline stage does between two messages",
          "tests/profile/test_profile.py::test_the_parts_add_up_to_what_a_step_takes"),
    Patch("megatron.core.ssm.gated_delta_net.common.HAVE_FLA", "mcore/linear_attention.py", "building",
          "the layer refuses to be built without kernels that its path in plain PyTorch never calls",
          "tests/model/torch_backend/test_gated_delta_net.py::test_linear_attention"),
    Patch("megatron.core.models.gpt.gpt_model.MultiTokenPredictionBlock", "mcore/mtp.py", "building",
          "GPTModel names the class of its MTP block; the parallel variant needs another",
          "tests/model/test_parity_one_rank.py::test_one_step_equals_the_plain_model"),
    Patch("TopKRouter.config", "mcore/router.py", "object",
          "the router z-loss of a repeated MTP layer counts once for each depth; its coefficient is divided in a copy",
          "tests/model/test_parity_one_rank.py::test_one_step_equals_the_plain_model"),
    Patch("TopKRouter.frozen_expert_bias", "model/build.py", "object",
          "expert biases of a frozen trunk go on moving",
          "tests/numerics/test_frozen_trunk.py::test_one_rank"),
    Patch("GPTModel.output_layer.weight", "model/mtp.py", "object",
          "with a tied head the last stage keeps an unused [v, h] parameter",
          "tests/numerics/test_upstream.py::test_two_stages"),
    Patch("TransformerBlock.final_layernorm (forward pre-hook)", "model/mtp.py", "object",
          "model.mtp_hidden_source = pre_final_norm: depth 1 reads the input of that norm",
          "tests/model/test_parity_one_rank.py::test_one_step_equals_the_plain_model"),
    Patch("TransformerConfig.recompute_granularity | recompute_method | recompute_num_layers", "model/mtp.py", "object",
          "each depth of the parallel variant is recomputed, so that one at a time holds its activations",
          "tests/numerics/test_parallel_memory.py::test_four_depths_hold_one_depths_activations"),
    Patch("ModuleSpec.module | self_attention | out_norm", "model/specs.py", "object",
          "MTP layers, latent attention and linear attention are classes of this project under Transformer Engine too",
          "tests/model/test_parity_one_rank.py::test_one_step_equals_the_plain_model"),
    Patch("ModuleSpec.submodules.mlp | TransformerConfig.ffn_hidden_size", "model/specs.py", "object",
          "model.mtp_layer_mlp: MLP takes the width of its second product from the config; MTP layers get a copy",
          "tests/parallel/test_counts.py::test_parameters_equal_the_model_that_is_built"),
    Patch("TransformerConfig.latent_norm_epsilon", "model/transformer_config.py", "object",
          "Megatron-Core has one epsilon for all norms; released models have another for those of the latents",
          "tests/convert/test_families.py::test_one_rank_computes_what_transformers_computes"),
    Patch("MLASelfAttention.q_layernorm.eps", "model/torch_backend/mla.py", "object",
          "as latent_norm_epsilon",
          "tests/convert/test_families.py::test_one_rank_computes_what_transformers_computes"),
    Patch("Parameter.average_gradients_across_tp_domain | tensor_model_parallel",
          "model/torch_backend/mla.py", "object",
          "a gradient that all tensor-parallel ranks hold alike is multiplied by TP, and counted TP times in the norm",
          "tests/model/torch_backend/test_parallel_layers.py::test_multi_latent_attention"),
    Patch("Parameter.sequence_parallel", "model/torch_backend/norm.py", "object",
          "the mark by which finalize_model_grads sums the gradient of a norm over tensor-parallel ranks",
          "tests/model/torch_backend/test_norm.py::test_parameters_are_marked_for_sequence_parallelism"),
    Patch("TransformerConfig.deterministic_mode | layernorm_zero_centered_gamma",
          "model/torch_backend/gated_delta_net.py", "object",
          "in a copy for one layer: its path in plain PyTorch, and an output norm that holds the weight itself",
          "tests/model/torch_backend/test_parallel_layers.py::test_gated_delta_net"),
    Patch("TransformerConfig.grad_scale_func | finalize_model_grads_func | no_sync_func | grad_sync_func | "
          "param_sync_func", "training/optimizer.py", "object",
          "Megatron-Core's own hooks, by which the schedules scale the loss and reduce gradients",
          "tests/numerics/test_upstream.py::test_the_loss_scale_reaches_every_term"),
    Patch("TransformerConfig.finalize_model_grads_func", "training/optimizer.py", "object",
          "gradients are examined before they are reduced, so that a bad one is attributed to its rank",
          "tests/training/guards/test_faults.py::test_the_rank_is_named"),
    Patch("TransformerConfig.finalize_model_grads_func", "profile/measure.py", "object",
          "a profile times the reduction of gradients",
          "tests/profile/test_profile.py::test_the_parts_add_up_to_what_a_step_takes"),
    Patch("torch.cuda, torch, torch.Tensor, torch.distributed, megatron.core.tensor_parallel.random: "
          "see `replacements`", "device/cpu_facade.py", "facade",
          "Megatron-Core asks torch.cuda for devices, streams and random states whatever the backend",
          "tests/device/test_cpu_facade.py::test_the_table_names_what_is_replaced"),
    Patch("torch.serialization.set_crc32_options", "checkpoint/writer.py", "call",
          "torch.save computes a CRC32 that no loader looks at, beside the SHA-256 of the manifest",
          "tests/checkpoint/test_writer.py::test_torch_reads_what_was_written_without_crc32"),
    Patch("sys.excepthook", "device/fake.py", "call",
          "torch wraps it for each process group; it is put back after each fake world",
          "tests/dry_run/test_dry_run.py::test_the_process_is_as_before"),
    Patch("warnings.filters | logging.Logger.level", "observe/logs.py", "process",
          "warnings and log lines of other packages that a user cannot act on, each with its reason; `silence_noise`",
          "tests/observe/test_logs.py::test_noise_is_silent_and_other_warnings_are_not"),
    Patch("warnings.filters", "dry_run/build.py", "call",
          "Megatron-Core's advice about speed on GPUs comes once for each layer of each rank",
          "tests/dry_run/test_dry_run.py::test_the_process_is_as_before"),
    Patch("warnings.filters", "doctor/report.py", "call",
          "the checks import what a report is about; what it lacks is the report",
          "tests/doctor/test_doctor.py"),
    Patch("warnings.filters", "verify/preload.py", "process",
          "the same, in the workers of `verify`; they import the module by its name",
          "tests/verify/test_verify.py"),
    Patch("mallopt (M_MMAP_MAX, M_TRIM_THRESHOLD)", "device/host_memory.py", "process",
          "on a CPU each step meets its activations as new pages, which the kernel fills with zeros",
          "tests/device/test_host_memory.py::test_kept_memory_is_met_without_page_faults_and_can_be_given_back"),
    Patch("botocore.retries.standard.ExponentialBackoff (defaults) | gcsfs.retry (random)", "storage/connection.py",
          "process", "pauses before a repeated request draw from Python's generator, whose state is in a checkpoint",
          "tests/storage/test_remote_path.py::test_pauses_leave_the_random_state_of_a_run_alone"),
)
# fmt: on


@contextmanager
def replaced(owner: Any, **new: Any) -> Iterator[None]:
    """Inside, the attributes of `owner` (a module, a class or an object) are the given ones."""
    missing = object()
    before = {name: vars(owner).get(name, missing) for name in new}
    for name, value in new.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(owner, name)  # it was inherited
            else:
                setattr(owner, name, value)
