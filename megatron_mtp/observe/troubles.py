"""What a run can print as a sign, a fault or a warning, and with which code it ends: cause and remedy of each.

`docs/troubleshooting.md` is made from these tables. Tests compare them with the code that prints the messages, so a new
sign, exit code or warning needs its row here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trouble:
    """One message.

    Args:
        shown: a part of the message, as it is printed; ... stands for what differs.
        source: file under megatron_mtp/ that prints it.
        cause: why it comes.
        remedy: what to do.
    """

    shown: str
    source: str
    cause: str
    remedy: str


SIGNS = {
    "not finite": Trouble(
        "mtp_k loss is ... If it stays so, go back to the last good checkpoint",
        "observe/health.py",
        "A loss is NaN or infinite: the learning rate is too high, fp16 has overflowed, or the weights have diverged. "
        "If only an `mtp_k loss` is NaN, look at `mtp_k/num_targets`: a batch without a valid target at that depth "
        "has no loss.",
        "By default the step is skipped (`train.on_nan`). If it comes again: a lower `optimizer.lr` or a longer "
        "warmup, `optimizer.clip_grad` = 1.0 or less, bf16 in place of fp16, `model.mtp_loss_scaling_factor` = 0.05. "
        "The fault line names the rank and its samples: look at them with `megatron-mtp data show PREFIX`.",
    ),
    "spikes": Trouble(
        "spikes of a loss or of the gradient norm since iteration ..., now ... is ..., ... times its noise above its "
        "level",
        "observe/health.py",
        "In five steps of the last 50 a loss or the gradient norm was far above its level: the learning rate is too "
        "high for the state of the run, or the data has stretches of broken text.",
        "A lower `optimizer.lr`, `optimizer.clip_grad` = 1.0 or less, or `train.on_spike = skip`. Look at the samples "
        "that the fault lines name.",
    ),
    "mtp rises": Trouble(
        "mtp_k loss rose from ... to ... while lm loss fell from ... to ...: that depth diverges",
        "observe/signs.py",
        "The MTP layers are unstable while the trunk still learns.",
        "Lower `model.mtp_loss_scaling_factor` to 0.05 to 0.1, then `optimizer.lr`; keep `optimizer.clip_grad` at 1.0 "
        "or less; use bf16 in place of fp16. If the loss does not come back, resume from a checkpoint before the rise.",
    ),
    "gap widens": Trouble(
        "the gap of mtp_k loss to lm loss widened from ... to ... nat: that depth does not keep up with the trunk",
        "observe/signs.py",
        "The MTP layers learn too slowly: their weight in the total is too small, or their loss is unstable. A gap "
        "that widens early in training is normal as long as both losses fall; the sign leaves that out.",
        "Raise `model.mtp_loss_scaling_factor` to 0.15 to 0.3. If the loss of the depth jumps, lower `optimizer.lr` "
        "first. With several depths, look at `model.mtp_depth_weights`.",
    ),
    "mtp stalls": Trouble(
        "mtp_k loss stays at ... while lm loss fell from ... to ...: that depth does not learn",
        "observe/signs.py",
        "The MTP layer of that depth is frozen, is not in the optimizer, or has next to no weight in the total.",
        "Look at `mtp/gradient_share`, `model.mtp_loss_scaling_factor` and `model.mtp_depth_weights`; log the norm of "
        "its gradient with `GradientNorms` (extending.md).",
    ),
    "mtp frozen": Trouble(
        "the weights of the MTP layer of ... stand still",
        "observe/signs.py",
        "The layer's parameters are frozen, are not in the optimizer, have a learning rate of 0, or a callback "
        "overwrites them. The losses need not show it: trunk, embedding and head learn for the layer.",
        "Look at `requires_grad` and the optimizer's parameter groups. If updates are skipped, mend that first.",
    ),
    "acceptance falls": Trouble(
        "the depth drafts worse than it did",
        "observe/signs.py",
        "The depth agrees less often with the main prediction than before, and is less often right itself.",
        "Look at its loss beside it: if it rises, as for a depth that diverges. If the loss factor falls over the run, "
        "let it end higher. A checkpoint from before is the better drafter.",
    ),
    "main overshadowed": Trouble(
        "the main loss is overshadowed",
        "observe/signs.py",
        "The MTP losses move the trunk more than the main loss does: `mtp/gradient_share` is above 75 %, or the main "
        "loss rises while an MTP loss falls.",
        "Lower `model.mtp_loss_scaling_factor` to 0.05 to 0.1, let it fall over the run, or detach the heads "
        "(`model.mtp_detach_heads`).",
    ),
    "memorising": Trouble(
        "the model learns its data by heart",
        "observe/health.py",
        "The loss of a validation set has risen by more than 0.1 nat above its lowest in two evaluations while the "
        "training loss fell: too many epochs over too little data.",
        "More data, fewer epochs, a smaller model or more `optimizer.weight_decay`. `checkpoint.keep_best` keeps the "
        "checkpoint with the lowest validation loss.",
    ),
    "grad norm drifts": Trouble(
        "grad-norm is at ..., ... times its median over the run, ...: training becomes unstable",
        "observe/signs.py",
        "The norm of the gradient is four times what is usual in this run. Losses often follow later.",
        "A lower `optimizer.lr`, `optimizer.clip_grad` = 1.0 or less; go back to a checkpoint before the drift if the "
        "loss rises too.",
    ),
    "experts imbalanced": Trouble(
        "experts are imbalanced",
        "observe/signs.py",
        "An expert gets more than three times the mean of its layer, or less than 2 % of it, and that was better "
        "before; or it is so after 1,000 steps. A dead expert costs memory and learns nothing; a loaded one makes its "
        "rank slow.",
        "Raise `model.moe_aux_loss_coeff`, or `model.moe_router_bias_update_rate` with "
        "`model.moe_router_enable_expert_bias`. `moe/max_load_layer_I` names the layer.",
    ),
    "data stalls": Trouble(
        "data comes too slowly",
        "observe/signs.py",
        "Some rank waits for its batch during more than a tenth of the time.",
        "Raise `dataset.prefetch_steps`; put the `.bin` files on a faster disk; look for other processes that use it.",
    ),
    "slow rank": Trouble(
        "is slow: ... ms until its gradients are computed",
        "training/callbacks/stragglers.py",
        "A rank takes `dist.straggler_factor` times as long as the median; all others wait for it.",
        "Look at that machine: another process, a GPU that is hot or throttled, a slow disk. `megatron-mtp doctor "
        "--node` measures it. If it stays, take the machine out of the job.",
    ),
    "worse than chance": Trouble(
        "lm loss stays at ..., above ln ... = ..., the loss of predicting every token alike: the model learns nothing",
        "observe/signs.py",
        "After the warmup the main loss is higher than that of a model that knows nothing: the learning rate is far "
        "too high, or labels and inputs do not belong together.",
        "Start again with a lower `optimizer.lr`, a longer warmup or `optimizer.clip_grad` = 1.0. Look at the data "
        "with `megatron-mtp data show PREFIX`: the tokenizer must be the one that the data was prepared with.",
    ),
    "one token": Trouble(
        "the MTP predictions agree with the main one at ... of the slots, and that one is right at ...: the model "
        "predicts one token nearly everywhere",
        "observe/signs.py",
        "The model has collapsed to the most frequent token, or has not learned more yet. Acceptance means nothing "
        "then.",
        "As for a loss above chance. Judge drafting by `mtp_k/top1_target` until the main prediction is right more "
        "often.",
    ),
}
"""Name of a health sign -> what it says. A sign of a depth or of a validation set has it after a colon in its name."""

FAULTS = (
    Trouble(
        "train.on_nan = skip: the update is skipped",
        "training/guards/faults.py",
        "A loss or the gradient of the step is not finite. The line names depth, rank, samples, and the parameters if "
        "only the gradient is bad.",
        "Single ones are harmless. The run ends with code 4 after `train.skip_limit` in a row; see the sign of a loss "
        "that is not finite.",
    ),
    Trouble(
        "train.on_nan = rollback: rollback",
        "training/guards/faults.py",
        "The same, and the run goes back to its newest checkpoint and passes over the batch.",
        "Nothing, if it does not come again. The run ends with code 4 after `train.rollback_limit` rollbacks.",
    ),
    Trouble(
        "sigmas above",
        "training/guards/faults.py",
        "A loss or the gradient norm is far above its mean of the last steps: a spike. With `train.on_spike = report` "
        "the update is applied.",
        "Look at the samples. If spikes come often: `train.on_spike = skip`, a lower `optimizer.lr`, or "
        "`optimizer.clip_grad` = 1.0 or less. `train.spike_sigmas` sets what counts as one.",
    ),
    Trouble(
        "steps were reported like that of iteration",
        "training/guards/repeats.py",
        "Spikes came at nearly every step and are over; this line counts them.",
        "As for spikes.",
    ),
    Trouble(
        "the run continues from iteration",
        "observe/recorder.py",
        "A rollback was done. Records of later iterations are void.",
        "Nothing.",
    ),
)
"""Lines of kind `fault` and `rollback` in metrics.jsonl."""

WARNINGS = (
    Trouble(
        "by estimate no split fits the memory of",
        "training/pretrain.py",
        "The planner found no split of the layers that fits the device; the fastest one is used.",
        "See *Out of memory* below; `megatron-mtp plan` shows each stage. Set `dist.hardware` if the device is another "
        "one.",
    ),
    Trouble(
        "failed and is dropped; training continues without it",
        "observe/recorder.py",
        "A record cannot be written: TensorBoard, W&B or metrics.jsonl; the disk is full or a server is away.",
        "Make room or repair the connection; the record is back after the next start.",
    ),
    Trouble(
        "the checkpoint has state of callbacks that are not in this run",
        "training/callbacks/base.py",
        "The run was started without a callback that it had before.",
        "Name the callback again with `--callback`, if it is to go on.",
    ),
    Trouble(
        "the watchdog has no store",
        "training/guards/watchdog.py",
        "The job's key-value store could not be made, so that a report of a hang has this rank's stack only.",
        "Nothing; the watchdog works.",
    ),
    Trouble(
        "is in use by ... Waiting, ... of at most ... s",
        "data/lock.py",
        "Another process trains or prepares data in the directory.",
        "Wait, or stop that process. If it is gone, this start takes over by itself.",
    ),
    Trouble(
        "taken over from ..., which is gone",
        "data/lock.py",
        "The process that had the directory has died.",
        "Nothing.",
    ),
    Trouble(
        "it is read again in",
        "data/data_file.py",
        "A data file could not be read; the disk or the network may come back.",
        "Look at the disk if it comes again; after several attempts the run saves and ends with code 2.",
    ),
    Trouble(
        "the block is downloaded again",
        "data/block_cache.py",
        "A block in the cache of data in object storage has another size than it was written with.",
        "Look at the disk of `dataset.object_storage_cache_path` if it comes again.",
    ),
    Trouble(
        "The cache of object storage is limited to",
        "data/block_cache.py",
        "The disk of `dataset.object_storage_cache_path` is full, so the cache became smaller and more is downloaded.",
        "Make room, or lower `dataset.object_storage_cache_gib`.",
    ),
    Trouble(
        "the index stays in memory; set dataset.path_to_cache",
        "data/corpus.py",
        "The folder of the data cannot be written, so the order of its documents is not kept on disk.",
        "Set `dataset.path_to_cache` to a folder that every node can write.",
    ),
    Trouble(
        "is damaged and skipped",
        "checkpoint/resuming.py",
        "A file of the checkpoint is missing or has another checksum; an older checkpoint is used.",
        "Find out what damages files: a full disk, a broken one. `megatron-mtp checkpoint verify RUN` reads them all.",
    ),
    Trouble(
        "the curve changes from iteration ... on",
        "checkpoint/resuming.py",
        "A config field that affects the loss differs from the checkpoint's.",
        "Set it back if it was not intended.",
    ),
    Trouble(
        "an old checkpoint cannot be removed",
        "checkpoint/checkpointer.py",
        "Rights or a server's fault; the run goes on.",
        "Remove it with `megatron-mtp checkpoint rm RUN@N`, or the disk fills.",
    ),
    Trouble(
        "memory ends with this process, and the checkpoints with it",
        "checkpoint/preflight.py",
        "`checkpoint.save` is an address of fsspec's memory, which is there for tests.",
        "Save to a folder, or to `s3://`, `gs://` or `az://`.",
    ),
    Trouble(
        "the damaged checkpoint of this name is replaced",
        "checkpoint/completion.py",
        "A checkpoint that was skipped as damaged is written again.",
        "Nothing.",
    ),
    Trouble(
        "unexpected error",
        "checkpoint/agreement.py",
        "Rank 0 met an error that was not foreseen while it read or wrote a checkpoint; the traceback is below the "
        "line.",
        "Report it with the traceback.",
    ),
)
"""Lines of the log that name something to look at; the run goes on."""

ERRORS = (
    Trouble(
        "ran out of memory",
        "training/guards/out_of_memory.py",
        "The plan of the fullest stage does not fit the device, or something else uses its memory.",
        "The message lists what each change would save. See *Out of memory* below.",
    ),
    Trouble(
        "the run stops before the update",
        "training/guards/faults.py",
        "Bad numbers with `train.on_nan` or `train.on_spike` = stop.",
        "See the sign of a loss that is not finite. The last checkpoint is from before.",
    ),
    Trouble(
        "updates in a row were skipped (train.skip_limit)",
        "training/guards/faults.py",
        "The numbers stay bad: the weights have diverged, or the data is broken.",
        "Go back to a checkpoint before that (`checkpoint.load=RUN@N` into another `checkpoint.save`) with a lower "
        "`optimizer.lr`. A restart alone ends here again.",
    ),
    Trouble(
        "rollbacks were done (train.rollback_limit)",
        "training/guards/faults.py",
        "The run came to bad numbers again and again.",
        "The same.",
    ),
    Trouble(
        "no progress for ... s (dist.watchdog_s): the job hangs and is ended",
        "training/guards/watchdog.py",
        "A rank is dead, frozen, or waits for another one; the report has all stacks and names those that are behind.",
        "Look at the machines that are named. If a step or a save takes longer than that, raise `dist.watchdog_s`.",
    ),
    Trouble(
        "replicas of the weights differ",
        "training/callbacks/replicas.py",
        "Memory or a link is failing, or an update was lost.",
        "Start again: a resume makes the replicas equal. If it comes twice, take that machine out of the job.",
    ),
    Trouble(
        "and that was not saved; the errors above say why",
        "training/saving.py",
        "The last checkpoint of the run could not be written: the disk is full or gone.",
        "Make room, then start the run again; it repeats the iterations that are named.",
    ),
    Trouble(
        "cannot be read any more",
        "data/data_file.py",
        "A data file has vanished, was cut, or its disk is away.",
        "Repair the file or the disk and start again: the run saved before it ended.",
    ),
    Trouble(
        "is in use by ... Wait until that process has ended",
        "data/lock.py",
        "Two runs in one directory.",
        "Stop one, or give it another `checkpoint.save`.",
    ),
    Trouble(
        "do not see what rank 0 on ... writes there",
        "training/guards/node_check.py",
        "`checkpoint.save` is not on a file system that all machines share.",
        "Choose a shared folder, or an address.",
    ),
    Trouble(
        "cannot be listed",
        "checkpoint/directory.py",
        "The disk or the server of a run directory refuses; the message ends with what it said, such as no bucket of "
        "that name, no permission, no credentials, or no connection.",
        "Repair that; for addresses see [object storage](operations.md#object-storage).",
    ),
)
"""Messages that end a run."""

EXIT_CODES = {
    0: ("the run is complete, or stopped where it was told to", "Nothing."),
    1: ("a crash, or replicas of the weights differ", "Read the traceback; a restart resumes."),
    2: ("a mistake that only you can mend: config, data, checkpoint directory", "Change what the message names."),
    3: ("preempted: SIGTERM came and a checkpoint was saved", "Start it again; launchers do so by themselves."),
    4: ("bad numbers, and the policy is to stop", "Lower the learning rate or look at the data before a restart."),
    5: ("the watchdog ended a hung job", "Look at the ranks and machines that its report names."),
    6: ("the last checkpoint could not be saved", "Make room on the disk, then start again."),
    7: ("a node is not fit: GPUs are missing or in use, or a disk is full", "Leave that node out, or free it."),
    137: ("a rank was killed by SIGKILL, often because the machine ran out of memory", "See *Out of memory* below."),
    143: ("SIGTERM came before there was anything to save", "Start it again."),
}
"""Code of the process -> (meaning, what to do)."""
