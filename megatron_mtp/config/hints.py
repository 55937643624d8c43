"""What is allowed but unusual, or makes a curve depend on its layout. Shown by `show`, never an error."""

from __future__ import annotations

from megatron_mtp.config.blend import is_mock
from megatron_mtp.config.loss_factor import LossFactor
from megatron_mtp.config.sections import ModelConfig, RunConfig
from megatron_mtp.config.timeline import Timeline

USUAL_FACTOR = (0.05, 0.3)
"""DeepSeek-V3, GLM-4.5, MiMo and Nemotron-3 train with 0.1 to 0.3."""

HIGH_ADAM_LR = 0.03
"""Adam moves each weight by about the learning rate; published runs use 1e-5 to 6e-3, tiny models up to 1e-2."""


def hints(cfg: RunConfig) -> list[str]:
    """Advice on a finalized config, one sentence or two each."""
    found = _mtp_hints(cfg.model) + _layout_hints(cfg.model) + _schedule_hints(cfg)
    if is_mock(cfg.dataset):
        found.append("dataset: mock data is used; set dataset.blend to train on text.")
    if cfg.checkpoint.save is None:
        text = "no phase can begin, and the run is refused" if cfg.phases else "nothing will be saved"
        found.append(f"checkpoint.save is not set: {text}.")
    return found + _phase_hints(cfg)


def _phase_hints(cfg: RunConfig) -> list[str]:
    if not cfg.phases:
        return []
    timeline = Timeline.of(cfg)
    end, found = timeline.end_samples(), []
    for phase in timeline.phases[1:]:
        if end is not None and phase.start.samples >= end:
            found.append(f"phases.{phase.name}: the run ends before it begins (step {phase.start.iteration:,}).")
    return found


def _mtp_hints(model: ModelConfig) -> list[str]:
    depths = model.mtp_num_layers
    if not depths:
        return []
    found = []
    if depths > 2:
        found.append(
            f"model.mtp_num_layers = {depths}: published pretraining runs use 1 or 2 depths. Each costs about one "
            "layer and one more pass through the output head."
        )
    low, high = LossFactor.parse(model.mtp_loss_scaling_factor).extremes
    if low < USUAL_FACTOR[0] or high > USUAL_FACTOR[1]:
        found.append(
            f"model.mtp_loss_scaling_factor = {model.mtp_loss_scaling_factor}: outside the usual {USUAL_FACTOR[0]} to "
            f"{USUAL_FACTOR[1]}; published runs use 0.3 first and 0.1 later."
        )
    if model.mtp_depth_weights and not any(model.mtp_depth_weights):
        found.append("model.mtp_depth_weights are all 0: the MTP layers are computed but not trained.")
    if model.add_bias_linear:
        found.append("model.add_bias_linear = True: the MTP projection has no bias, as in Megatron-Core.")
    return found


def _layout_hints(model: ModelConfig) -> list[str]:
    found = []
    for name in ("attention_dropout", "hidden_dropout"):
        if getattr(model, name):
            found.append(f"model.{name} = {getattr(model, name)}: the curve depends on the layout.")
    if model.moe_router_load_balancing_type == "aux_loss" and model.moe_aux_loss_coeff:
        found.append(
            "model.moe_router_load_balancing_type = 'aux_loss': balances within each micro-batch, so the curve "
            "depends on train.micro_batch_size (not on the layout). 'seq_aux_loss' and the expert bias do not."
        )
    if model.moe_expert_capacity_factor is not None:
        found.append(
            f"model.moe_expert_capacity_factor = {model.moe_expert_capacity_factor}: which tokens are dropped, and so "
            "the curve, depends on the layout."
        )
    if model.mcore.get("moe_router_force_load_balancing"):
        found.append("model.mcore.moe_router_force_load_balancing: the router is random; for timing only.")
    return found


def _schedule_hints(cfg: RunConfig) -> list[str]:
    sched, train, found = cfg.scheduler, cfg.train, []
    for unit in ("iters", "samples", "tokens"):
        warmup, length = getattr(sched, f"lr_warmup_{unit}"), getattr(train, f"train_{unit}")
        if length is not None and warmup >= length:
            found.append(
                f"scheduler.lr_warmup_{unit} = {warmup}: the run ends after {length} {unit}, before the learning rate "
                "reaches its peak."
            )
    if train.rampup_batch_size is not None and train.rampup_batch_size[0] == train.global_batch_size:
        found.append("train.rampup_batch_size starts at train.global_batch_size: there is no ramp.")
    if cfg.optimizer.optimizer == "adam" and cfg.optimizer.lr > HIGH_ADAM_LR:
        found.append(
            f"optimizer.lr = {cfg.optimizer.lr}: Adam moves each weight by about this much in a step, and published "
            "runs use 1e-5 to 6e-3; the loss may rise above that of an untrained model and stay there."
        )
    if cfg.optimizer.clip_grad == 0:
        found.append("optimizer.clip_grad = 0: gradients are not clipped; MTP runs are usually clipped to 1.0.")
    return found
