"""The warning signs that can be seen in the metrics of a run. Each is a function of the levels before and now.

A sign returns evidence in numbers and advice while it holds. `health.HealthMonitor` decides when it begins and ends.
`troubles.SIGNS` has cause and remedy of each for `docs/troubleshooting.md`.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence

from megatron_mtp.observe.trends import WINDOW_STEPS, Level, Window, gap_name

Sign = Callable[[Sequence[Window], Window], str | None]
"""(earlier windows, the current one) -> what is wrong, with advice, or None."""

RISE_NATS = 0.1
"""A loss has risen if its level is significantly more than this above an earlier one."""
WIDENING_NATS = 1.0
"""Largest healthy increase of the gap between an MTP loss and the main loss."""
HEALTHY_SHARE = 1 / 3
"""Early in training the main loss falls faster than the others and every gap widens. That is healthy as long as the MTP
loss falls by at least this share of the main loss's fall."""
STALL_NATS, STALL_SHARE = 0.3, 0.1
"""A depth stalls if the main loss has fallen by the first while the loss of the depth fell by less than the second of
that."""
LARGEST_SHARE = 0.75
"""Largest healthy share of MTP in the norm of the gradient at the trunk's output: three times that of the main loss.
Four heads of equal weight (Gloeckle et al. 2024) stay below it."""
ACCEPTANCE_FALL, TOP1_FALL = 0.05, 0.01
"""A depth drafts worse if it is accepted this much less often than before, and is itself right this much less often."""
MEMORISING_NATS = 0.1
"""Rise of a validation loss above its lowest."""
DRIFT = 4.0
"""The gradient norm drifts when it is this many times its typical level, the median over the run."""
DRIFT_WINDOWS = 5
"""Windows without which no level is typical."""
HIGH_LOAD, LOW_LOAD = 3.0, 0.02
"""Loads of an expert that count as imbalance, in units of the mean of its layer."""
LOAD_CHANGE = 2.0
"""A load has changed if it is this many times an earlier one, or less than one part in this many."""
IMBALANCE_STEPS = 1000
"""Routers start imbalanced; one that is still so after this many steps is a sign too."""
DATA_SHARE = 0.1
"""Largest share of the time that may go into waiting for data."""
AGREEING, WRONG = 0.98, 0.2
"""Depths that agree with the main prediction at this share of the slots, while it is right at no more than that share,
predict one token nearly everywhere."""
LOOKS = {"worse than chance": 3, "one token": 3}
"""Looks in a row for which these signs must hold: the windows of the first and the last do not overlap."""


def mtp_rises(loss: str) -> Sign:
    """The loss of a depth rises while the main loss falls."""

    def sign(history: Sequence[Window], now: Window) -> str | None:
        for old in _having(history, now, loss, "lm loss"):
            before, level = old.metrics[loss], now.metrics[loss]
            if level.above(before) > RISE_NATS and now.main.below(old.main) > 0:
                return (
                    f"{loss} rose from {before.value:.3f} to {level.value:.3f} while lm loss fell from "
                    f"{old.main.value:.3f} to {now.main.value:.3f}: that depth diverges. Lower "
                    "model.mtp_loss_scaling_factor (0.05 to 0.1), then optimizer.lr; keep optimizer.clip_grad at 1.0 "
                    "or less and prefer precision.dtype = bf16 to fp16."
                )
        return None

    return sign


def gap_widens(loss: str) -> Sign:
    """The loss of a depth falls behind the main loss."""

    name = gap_name(loss)

    def sign(history: Sequence[Window], now: Window) -> str | None:
        for old in _having(history, now, loss, "lm loss", name):
            before, gap = old.metrics[name], now.metrics[name]
            if gap.above(before) <= WIDENING_NATS:
                continue
            fall = _largest_fall(old.metrics[loss], now.metrics[loss])
            if fall >= HEALTHY_SHARE * (old.main.value - now.main.value) > 0:
                continue
            return (
                f"the gap of {loss} to lm loss widened from {before.value:.2f} to {gap.value:.2f} nat: that "
                "depth does not keep up with the trunk. Raise model.mtp_loss_scaling_factor (0.15 to 0.3); if its "
                "loss is unstable, lower optimizer.lr, keep optimizer.clip_grad at 1.0 or less and prefer "
                "precision.dtype = bf16 to fp16."
            )
        return None

    return sign


def mtp_stalls(loss: str) -> Sign:
    """The loss of a depth stands still while the main loss falls."""

    def sign(history: Sequence[Window], now: Window) -> str | None:
        earlier = reversed(_having(history, now, loss, "lm loss"))
        old = next((old for old in earlier if now.main.below(old.main) > STALL_NATS), None)
        if old is None:
            return None
        fall, before, level = old.main.value - now.main.value, old.metrics[loss], now.metrics[loss]
        if not STALL_SHARE * fall > before.value - level.value >= -RISE_NATS:
            return None
        if _largest_fall(before, level) >= HEALTHY_SHARE * fall:
            return None
        return (
            f"{loss} stays at {level.value:.3f} (before: {before.value:.3f}) while lm loss fell from "
            f"{old.main.value:.3f} to {now.main.value:.3f}: that depth does not learn. Look whether its "
            "parameters are frozen or left out of the optimizer; raise model.mtp_loss_scaling_factor (0.15 to "
            "0.3) or its entry in model.mtp_depth_weights."
        )

    return sign


def mtp_frozen(depth: str) -> Sign:
    """The weights of an MTP layer do not change. Its loss need not show it: trunk, embedding and head learn for it."""
    name = f"{depth}/weight_change"

    def sign(history: Sequence[Window], now: Window) -> str | None:
        change, rate = now.metrics.get(name), now.metrics.get("learning-rate")
        if change is None or change.value > 0 or rate is None or not rate.value > 0:
            return None
        return (
            f"the weights of the MTP layer of {depth} stand still ({name} is 0) at a learning rate of "
            f"{rate.value:.3g}. Look whether its parameters are frozen (requires_grad), left out of the optimizer, "
            "have a learning rate of 0, or are overwritten by a callback; and whether every update is skipped."
        )

    return sign


def acceptance_falls(depth: str) -> Sign:
    """A depth drafts worse than before: it agrees less often with the main prediction, and is itself right less often.

    Acceptance alone also falls in a healthy start: a model that predicts one token everywhere agrees with itself.
    """
    accepted, top1 = f"{depth}/accepted", f"{depth}/top1_target"

    def sign(history: Sequence[Window], now: Window) -> str | None:
        for old in _having(history, now, accepted, top1):
            before, level = old.metrics[accepted], now.metrics[accepted]
            if level.below(before) > ACCEPTANCE_FALL and now.metrics[top1].below(old.metrics[top1]) > TOP1_FALL:
                return (
                    f"{accepted} fell from {before.value:.1%} to {level.value:.1%}, and {top1} from "
                    f"{old.metrics[top1].value:.1%} to {now.metrics[top1].value:.1%}: the depth drafts worse than it "
                    "did. Look at its loss; lower optimizer.lr if it rises, or go back to an earlier checkpoint."
                )
        return None

    return sign


def main_overshadowed(history: Sequence[Window], now: Window) -> str | None:
    """MTP moves the trunk more than the main loss does, or the main loss rises while an MTP loss falls."""
    advice = "Lower model.mtp_loss_scaling_factor (0.05 to 0.1), or let it fall over the run."
    share = now.metrics.get("mtp/gradient_share")
    if share is not None and share.over(LARGEST_SHARE):
        return (
            f"MTP makes {share.value:.0%} of the gradient at the trunk's output (mtp/gradient_share), more than "
            f"{LARGEST_SHARE:.0%}: the main loss is overshadowed. {advice}"
        )
    for old in _having(history, now, "lm loss"):
        if now.main.above(old.main) <= RISE_NATS:
            continue
        for name in sorted(now.mtp.keys() & old.mtp.keys()):
            if now.mtp[name].below(old.mtp[name]) > 0:
                known = "" if share is None else f" MTP makes {share.value:.0%} of the gradient at the trunk's output."
                return (
                    f"lm loss rose from {old.main.value:.3f} to {now.main.value:.3f} while {name} fell from "
                    f"{old.mtp[name].value:.3f} to {now.mtp[name].value:.3f}: the main loss is overshadowed.{known} "
                    f"{advice}"
                )
    return None


def grad_norm_drifts(history: Sequence[Window], now: Window) -> str | None:
    """The norm of the gradient has left the level that is typical of the run."""
    level = now.metrics.get("log grad-norm")
    earlier = [old.metrics["log grad-norm"] for old in _having(history, now, "log grad-norm")]
    if level is None or len(earlier) < DRIFT_WINDOWS:
        return None
    typical = Level(statistics.median(old.value for old in earlier), statistics.median(old.error for old in earlier))
    if level.above(typical) <= math.log(DRIFT):
        return None
    return (
        f"grad-norm is at {math.exp(level.value):.3g}, {math.exp(level.value - typical.value):.1f} times its median "
        f"over the run, {math.exp(typical.value):.3g}: training becomes unstable. Lower optimizer.lr or "
        "optimizer.clip_grad, or go back to an earlier checkpoint with a longer warmup."
    )


def experts_imbalanced(history: Sequence[Window], now: Window) -> str | None:
    """Some expert gets far more tokens than the others, or next to none."""
    earlier = _having(history, now, "moe/max_load", "moe/min_load")
    if not earlier:
        return None
    high, low = now.metrics["moe/max_load"], now.metrics["moe/min_load"]
    least = min((old.metrics["moe/max_load"] for old in earlier), key=lambda level: level.value)
    most = max((old.metrics["moe/min_load"] for old in earlier), key=lambda level: level.value)
    is_old = now.step - earlier[0].step >= IMBALANCE_STEPS
    found = []
    if high.value > HIGH_LOAD and (is_old or (high.value > LOAD_CHANGE * least.value and high.above(least) > 0)):
        found.append(f"one expert gets {high.value:.1f} times the mean of its layer (moe/max_load; {least.value:.1f})")
    if low.value < LOW_LOAD and (is_old or (low.value < most.value / LOAD_CHANGE and low.below(most) > 0)):
        found.append(f"one expert gets {low.value:.1%} of the mean of its layer (moe/min_load; {most.value:.1%})")
    if not found:
        return None
    return (
        f"{' and '.join(found)}: experts are imbalanced. In brackets: the best so far. moe/max_load_layer_I names the "
        "layer. Raise "
        "model.moe_aux_loss_coeff, or model.moe_router_bias_update_rate with model.moe_router_enable_expert_bias; "
        "lower optimizer.lr if the router collapsed suddenly."
    )


def data_stalls(history: Sequence[Window], now: Window) -> str | None:
    """Training waits for its data."""
    share = now.metrics.get("data share")
    if share is None or not share.over(DATA_SHARE):
        return None
    wait, step = now.metrics["perf/data_ms"], now.metrics["perf/iteration_time_ms"]
    return (
        f"training waits {wait.value:.0f} ms for each batch, beside {step.value:.0f} ms in the step: data comes too "
        "slowly. Raise dataset.prefetch_steps, put the .bin files on a faster disk, and look whether another process "
        "uses the disk."
    )


def empty_agreement(rates: Mapping[str, float]) -> str | None:
    """A remark where acceptance means nothing: all depths predict one token nearly everywhere.

    Args:
        rates: acceptance rates by name, among any other metrics.
    """
    right = rates.get("lm/top1_target", 1.0)
    agreeing = [rate for name, rate in rates.items() if re.fullmatch(r"mtp_\d+/top1_main", name)]
    if not agreeing or min(agreeing) < AGREEING or right > WRONG:
        return None
    return (
        f"the MTP predictions agree with the main one at {min(agreeing):.1%} of the slots, and that one is right at "
        f"{right:.1%}: the model predicts one token nearly everywhere. Acceptance (mtp_k/accepted, "
        "mtp/accepted_length) means nothing here; look at top1_target."
    )


def signs_after_warmup(vocab_size: int, warmup_samples: float) -> dict[str, Sign]:
    """Signs that the model has stopped learning: both must hold for LOOKS, and the main loss does not fall meanwhile.

    Args:
        vocab_size: ids that the model predicts.
        warmup_samples: of the learning rate. Before its end they are silent.
    """

    def after_warmup(sign: Callable[[Window], str | None]) -> Sign:
        def stays(history: Sequence[Window], now: Window) -> str | None:
            seen = now.metrics.get("consumed-samples")
            if not history or seen is None or seen.value <= warmup_samples:
                return None
            earlier = next((old for old in reversed(history) if now.step - old.step >= WINDOW_STEPS), None)
            return None if earlier is None or earlier.main.above(now.main) > 0 else sign(now)

        return stays

    chance = math.log(vocab_size)

    def worse_than_chance(window: Window) -> str | None:
        if not window.main.over(chance):
            return None
        return (
            f"lm loss stays at {window.main.value:.2f}, above ln {vocab_size} = {chance:.2f}, the loss of predicting "
            "every token alike: the model learns nothing. Start again with a lower optimizer.lr, a longer warmup or "
            "optimizer.clip_grad = 1.0; weights that diverged so far rarely recover."
        )

    def one_token(window: Window) -> str | None:
        return empty_agreement({name: level.value for name, level in window.metrics.items()})

    return {"worse than chance": after_warmup(worse_than_chance), "one token": after_warmup(one_token)}


def built_in_signs(num_depths: int) -> dict[str, Sign]:
    """The signs that any run is watched for, by name; those of a depth have it after a colon, as `mtp rises: mtp_1`."""
    of_loss = {"mtp rises": mtp_rises, "gap widens": gap_widens, "mtp stalls": mtp_stalls}
    of_depth = {"mtp frozen": mtp_frozen, "acceptance falls": acceptance_falls}
    signs: dict[str, Sign] = {}
    for depth in [f"mtp_{k}" for k in range(1, num_depths + 1)]:
        signs |= {f"{name}: {depth}": make(f"{depth} loss") for name, make in of_loss.items()}
        signs |= {f"{name}: {depth}": make(depth) for name, make in of_depth.items()}
    return signs | {
        "main overshadowed": main_overshadowed,
        "grad norm drifts": grad_norm_drifts,
        "experts imbalanced": experts_imbalanced,
        "data stalls": data_stalls,
    }


def _largest_fall(old: Level, now: Level) -> float:
    """By how much a metric may have fallen at most, noise considered."""
    return old.value - now.value + now.sigmas * math.hypot(old.error, now.error)


def _having(history: Sequence[Window], now: Window, *names: str) -> list[Window]:
    """The earlier windows that have these metrics, if the present one has them too."""
    if any(name not in now.metrics for name in names):
        return []
    return [old for old in history if all(name in old.metrics for name in names)]
