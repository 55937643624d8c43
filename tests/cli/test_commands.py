"""The commands: what they print, what they import, how they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_mtp.cli.main import COMMANDS, main
from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.overrides import apply_yaml
from megatron_mtp.data.prepare.bpe import train_bpe
from megatron_mtp.errors import DataError
from megatron_mtp.launch import failure
from megatron_mtp.observe.failure_file import FAILURE_DIR
from megatron_mtp.parallel.facts import short_count, short_layout
from megatron_mtp.recipes import RECIPES, get_recipe
from tests.harness.cpu_time import is_quick

pytestmark = pytest.mark.unit


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command in this process: (exit code, stdout, stderr)."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", FAILURE_DIR):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return call


def test_recipes_lists_every_recipe(run):
    code, out, _ = run("recipes")
    assert code == 0
    for name in RECIPES:
        assert name in out
    assert "683B" in out
    assert "38.2B" in out


def test_recipes_as_json(run):
    code, out, _ = run("recipes", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert set(rows) == set(RECIPES)
    assert rows["deepseek_v3"]["processes"] == 1024
    assert rows["deepseek_v3"]["parallel"]["expert"] == 64
    assert (rows["llama3_8b"]["processes"], rows["llama3_8b"]["num_devices"]) == (4, 8)
    code, out, _ = run("plan", "llama3_8b", "--json")
    assert (code, json.loads(out)["devices"]) == (0, 8), "what `recipes` names, `plan` takes, and it fits"
    assert rows["demo"]["mtp_num_layers"] == 2
    assert all(row["description"] for row in rows.values())


def test_show_prints_yaml_that_gives_the_same_config(run, tmp_path):
    code, out, _ = run("show", "tiny_mla_moe", "model.num_layers=5", "model.moe_layer_freq=1", "checkpoint.save=007")
    assert code == 0
    path = tmp_path / "run.yaml"
    path.write_text(out)
    cfg = get_recipe("demo")
    apply_yaml(cfg, path)
    shown = ConfigContainer.from_yaml(path)
    assert cfg == shown
    assert (shown.model.num_layers, shown.checkpoint.save) == (5, "007")
    assert "num_layers: 5  # recipe: 4" in out
    assert "# hint: dataset: mock data" in out


def test_show_differences(run):
    code, out, _ = run("show", "tiny_dense", "--diff", "model.mtp_num_layers=3")
    assert code == 0
    changes = [line for line in out.splitlines() if not line.startswith("#")]
    assert changes == ["model.mtp_num_layers: 2 -> 3"]
    assert "hint: model.mtp_num_layers = 3" in out
    assert "nothing differs" in run("show", "tiny_dense", "--diff")[1]


def test_show_as_json(run):
    _, out, _ = run("show", "qwen3_30b_a3b", "--json", "model.num_layers=24")
    data = json.loads(out)
    assert data["config"]["model"]["num_layers"] == 24
    assert data["changes"] == {"model.num_layers": {"recipe": 48, "here": 24}}
    assert data["layout"].count("t") == 24
    assert data["parameters"]["total"] > data["parameters"]["active"]
    assert any("aux_loss" in hint for hint in data["hints"])


def test_arguments_win_over_files_and_later_files_over_earlier(run, tmp_path):
    (tmp_path / "a.yaml").write_text("train: {train_iters: 1, micro_batch_size: 1}\noptimizer: {lr: 0.01}\n")
    (tmp_path / "b.yaml").write_text("train: {train_iters: 2}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    _, out, _ = run("show", "tiny_dense", *files, "optimizer.lr=0.02", "--json")
    cfg = json.loads(out)["config"]
    assert (cfg["train"]["train_iters"], cfg["train"]["micro_batch_size"], cfg["optimizer"]["lr"]) == (2, 1, 0.02)


def test_show_opens_no_data(run):
    code, _, _ = run("show", "demo", "dataset.blend=[[/absent/a], null]", "tokenizer.tokenizer_type=huggingface",
                     "tokenizer.tokenizer_model=/absent/tokenizer.json", "model.vocab_size=null")  # fmt: skip
    assert code == 0


def test_show_says_if_the_tokenizer_cannot_be_opened_here(run, tmp_path):
    file = tmp_path / "tokenizer.json"
    settings = ["tokenizer.tokenizer_type=huggingface", f"tokenizer.tokenizer_model={file}"]
    _, out, _ = run("show", "demo", *settings)
    said = f"# hint: tokenizer.tokenizer_model: tokenizer {file}: cannot be read (No such file or directory). "
    assert said + "A run on this machine would be refused." in out
    file.write_text("{}")
    _, out, _ = run("show", "demo", *settings, "--json")
    assert any(f"{file}: is not a Hugging Face tokenizer.json" in hint for hint in json.loads(out)["hints"])


def test_a_tokenizer_at_hand_gives_the_size_of_the_vocabulary(run, tmp_path):
    """To `show`, whose YAML leaves it open, and to `plan`."""
    file = tmp_path / "tokenizer.json"
    train_bpe(["one two three"] * 9, 260, file)
    settings = ["tokenizer.tokenizer_type=huggingface", f"tokenizer.tokenizer_model={file}", "model.vocab_size=null"]
    _, out, _ = run("show", "tiny_dense", *settings)
    assert "parameters; vocabulary 260" in out
    assert "  vocab_size: null" in out
    assert "hint: tokenizer" not in out
    code, out, _ = run("plan", "tiny_dense", *settings)
    assert (code, "step" in out) == (0, True)


BAD = [
    (["tiny_denes"], "Did you mean tiny_dense"),
    (["tiny_dense", "model.nun_layers=3"], "Did you mean model.num_layers?"),
    (["tiny_dense", "model.pipeline_model_parallel_split_rank=1"], "Use model.pipeline_model_parallel_layout"),
    (["tiny_dense", "model.num_layers=abc"], "model.num_layers = 'abc': must be an integer"),
    (["tiny_dense", "model.tensor_model_parallel_size=3"], "must be divisible by model.tensor_model_parallel_size = 3"),
    (["tiny_dense", "model.num_layers=1", "model.pipeline_model_parallel_size=5"], "no stage may be empty"),
    (["tiny_dense", "model.seq_length=66", "model.context_parallel_size=2"], "2 x model.context_parallel_size"),
    (["tiny_dense", "train.global_batch_size=7"], "train.global_batch_size = 7"),
    (["tiny_moe", "model.expert_model_parallel_size=3"], "model.expert_model_parallel_size = 3"),
    (["tiny_dense", "model.position_embedding_type=learned_absolute"], "learned_absolute"),
    (["tiny_dense", "model.mtp_loss_scaling_factor=-1"], "mtp_loss_scaling_factor = -1: must be at least 0"),
    (["tiny_dense", "model.mtp_loss_scaling_factor=nan"], "must be a finite number that is not negative"),
    (["tiny_dense", "--config", "absent.yaml"], "config file 'absent.yaml' cannot be read"),
    (["tiny_dense", "ddp.use_megatron_fsdp=true"], "fully sharded data parallelism is not supported"),
]  # fmt: skip


@pytest.mark.parametrize("command", [["show"], ["pretrain"], ["pretrain", "--nproc", "2"]], ids=" ".join)
@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_mistakes_end_with_2_and_one_message(run, monkeypatch, tmp_path, command, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    code, out, err = run(*command, *arguments)
    assert code == 2
    assert err.count(words) == 1
    assert err.startswith("megatron-mtp: ")
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["show", "plan", "verify"])
def test_with_json_mistakes_are_objects(run, command):
    code, out, err = run(command, "tiny_dense", "--json", "train.global_batch_size=7", "optimizer.lr=0")
    data = json.loads(out)
    assert (code, data["error"]) == (2, "ConfigError")
    by_field = {problem["fields"][0]: problem for problem in data["problems"]}
    assert by_field["optimizer.lr"]["rule"] == "must be above 0 and at most 1_000"
    batch = by_field["train.global_batch_size"]
    assert (batch["value"], batch["fields"][1]) == (7, "train.micro_batch_size")
    assert "train.global_batch_size = 7: must be divisible" in err


def test_world_size_that_does_not_fit(run, monkeypatch):
    code, _, err = run("pretrain", "demo")
    assert (code, "world_size = 1: must be a multiple of 2" in err, "--nproc 2" in err) == (2, True, True)
    assert run("show", "demo", "--world-size", "3")[0] == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "world_size = 3" in run("pretrain", "demo")[2]
    assert "torchrun has started the processes already" in run("pretrain", "demo", "--nproc", "2")[2]


def test_several_problems_are_a_list(run):
    _, _, err = run("show", "tiny_dense", "model.num_layers=abc", "train.x=1")
    assert err.splitlines()[0] == "megatron-mtp: 2 problems"
    assert all(line.startswith("  - ") for line in err.splitlines()[1:])


def test_ranks_beside_rank_0_say_nothing_about_a_shared_mistake(run, monkeypatch):
    waited = []
    monkeypatch.setattr(failure.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("pretrain", "tiny_dense", "model.num_layers=abc") == (2, "", "")
    assert waited == [failure.SILENCE_S], "it waits for rank 0 to speak first"


def test_a_rank_with_a_mistake_of_its_own_speaks_after_a_while(monkeypatch, capsys):
    monkeypatch.setattr(failure.time, "sleep", lambda _: None)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert failure.exit_code_of(DataError("token id 7")) == 2
    assert capsys.readouterr().err == "[rank 3] megatron-mtp: token id 7\n"


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ZeroDivisionError):
        failure.exit_code_of(ZeroDivisionError())


def test_overview_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for name, (_, line) in COMMANDS.items():
        assert name in out
        assert line.split(".")[0] in out
    assert run("--version")[1].startswith("megatron-mtp 0.")


@pytest.mark.parametrize("name", ["recipes", "show", "pretrain"])
def test_each_command_has_help(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert name in out


QUICK = [
    ["recipes"],
    ["recipes", "--json"],
    ["show", "deepseek_v3"],
    ["show", "tiny_dense", "model.num_layers=8", "--diff"],
]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_quick_commands_import_neither_torch_nor_megatron(arguments):
    code = (
        "import sys\nfrom megatron_mtp.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'megatron', 'numpy', 'omegaconf', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", QUICK[::2], ids=" ".join)
def test_quick_commands_are_quick(arguments):
    assert is_quick("-m", "megatron_mtp", *arguments)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1K"), (999_600, "1M"), (671_026_419_200, "671B"), (1_500_000_000_000, "1.5T")],
)
def test_short_counts(number, text):
    assert short_count(number) == text


def test_short_layouts():
    assert short_layout("Ettt|tttt|tttt|ttmL") == "Et*3 | (t*4) x 2 | t*2mL"


COMMAND = [sys.executable, "-c", "from megatron_mtp.cli.main import main; main()"]


@pytest.mark.parametrize(
    "line", ["recipes", "show tiny_dense --json", "show tiny_dense rng.seed=-1 --json", "plan --help"]
)
def test_output_that_cannot_be_written_is_one_line(line):
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*COMMAND, *line.split()], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr == "megatron-mtp: standard output cannot be written: No space left on device.\n"


def test_a_pipe_without_a_reader_ends_a_command_in_silence():
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([*COMMAND, "recipes"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_an_error_that_has_nothing_to_do_with_the_output_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")  # as a write to another file

    monkeypatch.setattr("megatron_mtp.cli.main.build_app", lambda chosen: fail)
    with pytest.raises(OSError, match="No space left"):
        main(["recipes"])
