"""Whether a run is complete, has ended, or goes on: as far as its log says it."""

from __future__ import annotations

from megatron_mtp.observe.run_log import RunLog

SILENT_S = 600
"""A run whose last record is older is probably not running."""


def status(log: RunLog, now: float) -> str:
    """Whether a run is complete, ended, or may be going on."""
    if (end := end_of(log)) is not None:
        return end
    age_s = now - last_time(log)
    if age_s > SILENT_S:
        return f"no record for {_duration(age_s)} and no end in the log: probably stopped or killed"
    return f"going on: last record {_duration(age_s)} ago"


def end_of(log: RunLog) -> str | None:
    """How the last process of a run ended; None: the log does not say that it did."""
    ends = [line["text"] for line in log.texts if line["kind"] == "end" and line["time"] >= log.start.get("time", 0)]
    last, total = log.last().get("iteration", 0), log.start.get("train_iters")
    return ends[-1] if ends else "complete" if total is not None and last >= total else None


def last_time(log: RunLog) -> float:
    """When the newest record was written, in seconds since 1970."""
    times = [line["time"] for line in (log.start, *log.texts, *log.evaluations) if "time" in line]
    return max([log.last().get("time", 0.0), *times])


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
