"""What a run leaves behind, read back from each kind of record."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.yaml_text import load_yaml
from megatron_mtp.errors import ConfigError
from megatron_mtp.observe.jsonl import read_metrics
from megatron_mtp.observe.metrics import columns, scalars
from megatron_mtp.observe.recorder import Recorder, RunInfo, metrics_path
from megatron_mtp.observe.trends import WINDOW_STEPS, Window
from tests.observe.records import make_record
from tests.observe.wandb_file import read_history, read_records

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _quiet_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def make_config(folder: Path, interval: int = 1, wandb: bool = False) -> ConfigContainer:
    cfg = ConfigContainer()
    cfg.logger.log_dir = str(folder / "logs")
    cfg.logger.tensorboard_dir = str(folder / "tb_logs")
    cfg.logger.log_interval = interval
    if wandb:
        cfg.logger.wandb_project, cfg.logger.wandb_exp_name = "mtp", "test"
        cfg.logger.wandb_save_dir, cfg.logger.wandb_mode = str(folder), "offline"
    return cfg


def record_steps(cfg: ConfigContainer, iterations: range, state: dict | None = None, offset: float = 0.0) -> dict:
    recorder = Recorder(
        cfg, RunInfo(iteration=iterations.start - 1, config={"a": 1}), is_writer=True, resume_state=state
    )
    for iteration in iterations:
        recorder.step(
            make_record(
                iteration, losses={"lm loss": 10.0 - iteration + offset, "mtp_1 loss": 11.0 - iteration + offset}
            )
        )
    recorder.close()
    return recorder.state()


def read_tensorboard(folder: str) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_and_wandb_hold_every_scalar_of_the_console_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cfg = make_config(tmp_path, wandb=True)
    record = make_record(7, losses={"lm loss": 7.5, "z_loss": 0.25, "mtp_1 loss": 7.75, "mtp_2 loss": math.nan})
    recorder = Recorder(cfg, RunInfo(), is_writer=True)
    recorder.step(record)
    recorder.close()
    line = capsys.readouterr().out
    tensorboard = read_tensorboard(cfg.logger.tensorboard_dir)
    wandb, warning = read_history(tmp_path, recorder.state()["wandb_run_id"])
    assert "mtp_2 loss is nan" in warning["text/warning"]
    (jsonl,) = read_metrics(metrics_path(cfg))
    assert wandb["iteration"] == jsonl["iteration"] == 7
    for column in columns(record):
        value = column.value(record)
        assert f"| {column.text(record)} |" in line
        assert tensorboard[column.name][7] == pytest.approx(value, rel=1e-6, nan_ok=True), column.name
        assert float(wandb[column.name]) == pytest.approx(value, nan_ok=True), column.name
        assert jsonl[column.name] == pytest.approx(value, nan_ok=True), column.name
    assert set(scalars(record)) <= set(tensorboard) & set(wandb) & set(jsonl)


def test_a_resumed_run_goes_on_in_its_records(tmp_path: Path):
    cfg = make_config(tmp_path, wandb=True)
    state = record_steps(cfg, range(1, 6))
    resumed = record_steps(cfg, range(4, 7), json.loads(json.dumps(state)), offset=0.5)
    assert resumed["wandb_run_id"] == state["wandb_run_id"]
    assert resumed["signs"]["trends"]["series"]["lm loss"][1] == [9.0, 8.0, 7.0, 6.0, 5.0, 6.5, 5.5, 4.5]
    expected = {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.5, 5: 5.5, 6: 4.5}
    steps = read_metrics(metrics_path(cfg))
    assert {step["iteration"]: step["lm loss"] for step in steps} == expected
    assert [step["iteration"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert read_tensorboard(cfg.logger.tensorboard_dir)["lm loss"] == expected
    rows = read_history(tmp_path, state["wandb_run_id"])
    assert {row["iteration"]: row["lm loss"] for row in rows} == expected
    assert len(rows) == 8  # nothing was dropped


def test_a_rollback_takes_the_signs_back_too(tmp_path: Path):
    recorder = Recorder(make_config(tmp_path), RunInfo(), is_writer=True)
    recorder.step(make_record(1, losses={"lm loss": 3.0}))
    kept = recorder.state()["signs"]
    recorder.step(make_record(2, losses={"lm loss": 9.0}))
    recorder.roll_back(1, kept)
    assert recorder.state()["signs"] == kept
    assert kept["trends"]["series"]["lm loss"][1] == [3.0]
    recorder.close()


def test_lines_of_a_longer_first_run_are_no_part_of_the_resumed_curve(tmp_path: Path):
    cfg = make_config(tmp_path)
    record_steps(cfg, range(1, 10))
    record_steps(cfg, range(4, 6))
    assert [step["iteration"] for step in read_metrics(metrics_path(cfg))] == [1, 2, 3, 4, 5]
    record_steps(cfg, range(1, 3))
    assert [step["iteration"] for step in read_metrics(metrics_path(cfg))] == [1, 2]
    assert list(read_tensorboard(cfg.logger.tensorboard_dir)["lm loss"]) == [1, 2]


def test_a_line_cut_off_by_a_crash_costs_that_line_only(tmp_path: Path):
    cfg = make_config(tmp_path)
    record_steps(cfg, range(1, 4))
    path = metrics_path(cfg)
    path.write_text(path.read_text()[:-20])
    assert [step["iteration"] for step in read_metrics(path)] == [1, 2]
    record_steps(cfg, range(3, 5))
    assert [step["iteration"] for step in read_metrics(path)] == [1, 2, 3, 4]
    assert len(read_metrics(path, "start")) == 2


def test_jsonl_is_strict_json_and_keeps_nan(tmp_path: Path):
    cfg = make_config(tmp_path)
    recorder = Recorder(cfg, RunInfo(), is_writer=True)
    recorder.step(make_record(1, losses={"lm loss": math.nan, "mtp_1 loss": -math.inf}))
    recorder.close()

    def refuse(word: str):
        raise AssertionError(word)

    for line in metrics_path(cfg).read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    (step,) = read_metrics(metrics_path(cfg))
    assert math.isnan(step["lm loss"])
    assert step["mtp_1 loss"] == -math.inf


def test_evaluations_are_kept_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cfg = make_config(tmp_path)
    recorder = Recorder(cfg, RunInfo(), is_writer=True)
    recorder.evaluation("validation", 0, {"lm loss": 2.0, "mtp_1 loss": 3.0}, {"mtp_1 acceptance": 0.5})
    recorder.evaluation("wiki", 0, {"lm loss": 4.0})
    recorder.evaluation("validation", 10, {"lm loss": 1.0, "mtp_1 loss": 2.0})
    recorder.close()
    assert "validation loss at iteration 10 | lm loss value: 1.000000E+00 |" in capsys.readouterr().out
    validation = read_metrics(metrics_path(cfg), "evaluation", "validation")
    assert [(e["iteration"], e["lm loss"]) for e in validation] == [(0, 2.0), (10, 1.0)]
    assert validation[0]["mtp_1 acceptance"] == 0.5
    assert len(read_metrics(metrics_path(cfg), "evaluation")) == 3
    tensorboard = read_tensorboard(cfg.logger.tensorboard_dir)
    assert tensorboard["valid/validation/mtp_1 loss"] == {0: 3.0, 10: 2.0}
    assert tensorboard["valid/wiki/lm loss"] == {0: 4.0}
    assert tensorboard["valid/validation/lm loss ppl"][10] == pytest.approx(math.e)


def test_console_comes_at_its_interval_first_and_last_step_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cfg = make_config(tmp_path, interval=4)
    cfg.logger.tensorboard_log_interval = 2
    recorder = Recorder(cfg, RunInfo(), is_writer=True)
    for iteration in range(1, 11):
        recorder.step(
            make_record(iteration, train_iters=10, losses={"lm loss": float(iteration)}, skipped=iteration % 2)
        )
    recorder.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "lm loss" in line]
    fields = [[field.strip() for field in line.split("|")] for line in lines]
    assert [field[0].split("iteration")[1].split("/")[0].strip() for field in fields] == ["1", "4", "8", "10"]
    assert "lm loss: 2.500000E+00" in fields[1]  # the mean of steps 1 to 4
    assert "lm loss: 9.500000E+00" in fields[3]  # of 9 and 10
    assert "number of skipped iterations:   2" in fields[1]
    steps = read_metrics(metrics_path(cfg))
    assert [(s["iteration"], s["lm loss"], s["skipped-iterations"]) for s in steps][:2] == [(2, 1.5, 1), (4, 3.5, 1)]


def test_warnings_are_logged_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cfg = make_config(tmp_path)
    recorder = Recorder(cfg, RunInfo(), is_writer=True)
    for iteration in (1, 2):
        recorder.step(make_record(iteration, losses={"lm loss": 3.0, "mtp_1 loss": math.nan}))
    recorder.message("a remark")
    recorder.close()
    warnings = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "mtp_1 loss is nan" in r.getMessage()
    ]
    assert len(warnings) == 1
    assert [line["text"] for line in read_metrics(metrics_path(cfg), "warning")] == warnings
    assert [(line["text"], line["iteration"]) for line in read_metrics(metrics_path(cfg), "message")] == [
        ("a remark", 2)
    ]


def read_texts(folder: str) -> dict[str, list[tuple[int, str]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder).Reload()
    texts = events.PluginTagToContent("text")
    return {tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)] for tag in texts}


def test_messages_reach_tensorboard_and_wandb_which_alerts_of_some(tmp_path: Path):
    cfg = make_config(tmp_path, wandb=True)
    cfg.logger.wandb_group, cfg.logger.wandb_tags, cfg.logger.wandb_notes = "sweep", ["a", "b"], "why"
    recorder = Recorder(cfg, RunInfo(), is_writer=True)
    recorder.message("loss is nan", kind="fault", iteration=3)
    recorder.message("loss is nan again", kind="fault", iteration=4, is_repeat=True)
    recorder.message("it heals", iteration=5)
    recorder.close()
    texts = read_texts(cfg.logger.tensorboard_dir)
    assert (texts["fault"], texts["message"]) == ([(3, "loss is nan")], [(5, "it heals")])
    run_id = recorder.state()["wandb_run_id"]
    rows = read_history(tmp_path, run_id)
    assert [(row["iteration"], row.get("text/fault"), row.get("text/message")) for row in rows] == [
        (3, "loss is nan", None),
        (5, None, "it heals"),
    ]
    (alert,) = read_records(tmp_path, run_id, "alert")
    assert (alert.title, alert.text, alert.level) == ("megatron-mtp: fault", "loss is nan", "ERROR")
    run = read_records(tmp_path, run_id, "run")[0]
    assert (run.run_group, sorted(run.tags), run.notes) == ("sweep", ["a", "b"], "why")
    assert [line["text"] for line in read_metrics(metrics_path(cfg), "fault")] == ["loss is nan", "loss is nan again"]


def test_a_warning_sign_is_an_alert(tmp_path: Path):
    cfg = make_config(tmp_path, wandb=True)
    recorder = Recorder(cfg, RunInfo(), is_writer=True)
    recorder.step(make_record(1, losses={"lm loss": math.nan}))
    recorder.close()
    (alert,) = read_records(tmp_path, recorder.state()["wandb_run_id"], "alert")
    assert (alert.title, alert.level) == ("megatron-mtp: warning, not finite", "WARN")
    ((step, text),) = read_texts(cfg.logger.tensorboard_dir)["warning"]
    assert (step, text) == (1, alert.text)


def test_the_end_of_a_sign_reaches_every_record(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cfg = make_config(tmp_path, wandb=True)
    recorder = Recorder(cfg, RunInfo(), is_writer=True)
    with caplog.at_level(logging.INFO):
        for iteration in range(1, 31):
            recorder.step(make_record(iteration, losses={"lm loss": math.nan if iteration < 5 else 3.0}))
    recorder.close()
    (line,) = read_metrics(metrics_path(cfg), "recovery")
    assert (line["iteration"], line["sign"]) == (24, "not finite")
    assert line["text"] == "iteration 24: the sign 'not finite' is over; it was reported at iteration 1."
    assert line["text"] in [r.getMessage() for r in caplog.records]
    assert read_texts(cfg.logger.tensorboard_dir)["recovery"] == [(24, line["text"])]
    alerts = read_records(tmp_path, recorder.state()["wandb_run_id"], "alert")
    assert [(a.title, a.level) for a in alerts] == [
        ("megatron-mtp: warning, not finite", "WARN"),
        ("megatron-mtp: recovery, not finite", "INFO"),
    ]


def test_the_config_is_in_tensorboard(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

    cfg = make_config(tmp_path, interval=7)
    cfg.optimizer.lr, cfg.model.mtp_freeze_trunk = 0.25, True
    Recorder(cfg, RunInfo(iteration=4, config=cfg.to_dict()), is_writer=True).close()
    ((step, text),) = read_texts(cfg.logger.tensorboard_dir)["config"]
    assert step == 4
    assert load_yaml(text.removeprefix("```yaml").removesuffix("```"), "text") == cfg.to_dict()
    content = EventAccumulator(cfg.logger.tensorboard_dir).Reload().PluginTagToContent("hparams")
    hparams = parse_session_start_info_plugin_data(content[SESSION_START_INFO_TAG]).hparams
    assert hparams["optimizer.lr"].number_value == 0.25
    assert hparams["model.mtp_freeze_trunk"].bool_value is True
    assert hparams["logger.log_dir"].string_value == cfg.logger.log_dir
    assert set(hparams) == {
        "optimizer.lr",
        "model.mtp_freeze_trunk",
        "logger.log_interval",
        "logger.log_dir",
        "logger.tensorboard_dir",
    }


def test_metrics_of_callbacks_are_in_every_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Means over the log interval: on the console and in every sink."""
    cfg = make_config(tmp_path, interval=2, wandb=True)
    cfg.logger.tensorboard_log_interval = 2
    recorder = Recorder(cfg, RunInfo(iteration=2), is_writer=True)
    recorder.step(make_record(3, metrics={"mine/share": 0.25}))
    recorder.step(make_record(4, metrics={"mine/share": 0.75}))
    recorder.close()
    assert capsys.readouterr().out.splitlines()[-1].endswith("| mine/share: 0.5 |")
    assert read_metrics(metrics_path(cfg))[-1]["mine/share"] == 0.5
    assert read_tensorboard(cfg.logger.tensorboard_dir)["mine/share"] == {4: 0.5}
    assert read_history(tmp_path, recorder.state()["wandb_run_id"])[-1]["mine/share"] == 0.5


def test_a_sign_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def grad_norm_grows(history: Sequence[Window], now: Window) -> str | None:
        grows = history and now.metrics["grad-norm"].above(history[-1].metrics["grad-norm"]) > 0
        return "the gradient norm grows." if grows else None

    signs = {"grad norm grows": grad_norm_grows}
    recorder = Recorder(make_config(tmp_path), RunInfo(), is_writer=True, signs=signs)
    for iteration in range(1, 3 * WINDOW_STEPS):
        recorder.step(make_record(iteration, grad_norm=float(iteration)))
    recorder.close()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f"iteration {WINDOW_STEPS + 10}: the gradient norm grows."]


def test_a_rank_that_does_not_write_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recorder = Recorder(
        make_config(tmp_path, wandb=True), RunInfo(), is_writer=False, resume_state={"wandb_run_id": "x"}
    )
    recorder.step(make_record(1))
    recorder.evaluation("validation", 1, {"lm loss": 1.0})
    recorder.message("hello")
    recorder.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
    assert recorder.state() == {"wandb_run_id": "x"}


def test_training_outlives_a_record_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cfg = make_config(tmp_path)
    recorder = Recorder(cfg, RunInfo(), is_writer=True)
    recorder.step(make_record(1))
    (metrics,) = [sink for sink in recorder._sinks if hasattr(sink, "_file")]
    metrics._file.close()
    recorder.step(make_record(2))
    recorder.step(make_record(3))
    recorder.close()
    assert sum("JsonlSink failed and is dropped" in r.getMessage() for r in caplog.records) == 1
    assert list(read_tensorboard(cfg.logger.tensorboard_dir)["lm loss"]) == [1, 2, 3]


def test_a_folder_that_cannot_be_made_is_a_users_mistake(tmp_path: Path):
    (tmp_path / "file").write_text("")
    cfg = make_config(tmp_path)
    cfg.logger.log_dir = str(tmp_path / "file" / "logs")
    with pytest.raises(ConfigError, match=r"logger\.log_dir = .*cannot write"):
        Recorder(cfg, RunInfo(), is_writer=True)


def test_wandb_without_a_key_is_a_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    cfg = make_config(tmp_path, wandb=True)
    cfg.logger.wandb_mode = "online"
    with pytest.raises(ConfigError, match=r"(?s)logger\.wandb_project = 'mtp'.*wandb login.*offline"):
        Recorder(cfg, RunInfo(), is_writer=True)


def test_metrics_have_a_place_without_log_dir(tmp_path: Path):
    cfg = ConfigContainer()
    assert metrics_path(cfg) is None
    cfg.checkpoint.save = str(tmp_path / "run_a")
    assert metrics_path(cfg) == tmp_path / "run_a.metrics.jsonl"


def test_neither_torch_nor_tensorflow_is_imported(tmp_path: Path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')\n")
    code = f"""
import sys
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.yaml_text import load_yaml
from megatron_mtp.observe.recorder import Recorder, RunInfo
from tests.observe.records import make_record
cfg = ConfigContainer()
cfg.logger.tensorboard_dir = {str(tmp_path / "tb_logs")!r}
recorder = Recorder(cfg, RunInfo(), True)
recorder.step(make_record(1))
recorder.close()
sys.exit(str({{"torch", "megatron", "wandb"}} & set(sys.modules)))
"""
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environ = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environ)
    assert done.stderr.strip() == "set()"
