"""Prompts, chats, stops and files of requests: the token ids are those of transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mtp.convert.side_files import end_ids
from megatron_mtp.data.prepare.bpe import train_bpe
from megatron_mtp.data.tokenizer import BytesTokenizer, HuggingFaceTokenizer, NullTokenizer
from megatron_mtp.drafting.chat import render
from megatron_mtp.drafting.decoder import LoadedModel
from megatron_mtp.drafting.generate import Streamer
from megatron_mtp.drafting.requests import StopText, answer_text, read_requests
from megatron_mtp.errors import DataError

pytestmark = pytest.mark.unit

BOS, START, END = "<|bos|>", "<|im_start|>", "<|im_end|>"
PROMPTS = [
    "",
    "f(x)",
    f"{START}user\nf(x){END}\n{START}",
    f"{BOS} return",
    "x<|endoftext|>y",
    "<tool>f</tool>",
    "5 %<|later|><|new|>",
]
CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message.content | trim }}"
    "{% if message.tool_calls is defined %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% generation %}{% endgeneration %}{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ raise_exception('no tools') }}{% endif %}\n[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Any]:
    """A tokenizer.json as an object, with three special tokens and one that is not special."""
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(["def f(x):\n    return x + 1\n"] * 3, 280, file)
    found = json.loads(file.read_text())
    first = max(found["model"]["vocab"].values()) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for id_, (text, is_special) in enumerate(((BOS, True), (START, True), (END, True), ("<tool>", False)), start=first):
        found["added_tokens"].append({"id": id_, "content": text, "special": is_special, **plain})
    return found


def add_bos(content: dict[str, Any]) -> None:
    """As Llama 3's file does."""
    id_ = next(token["id"] for token in content["added_tokens"] if token["content"] == BOS)
    special, sequence = {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [special, sequence, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {BOS: {"id": BOS, "ids": [id_], "tokens": [BOS]}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, sequence],
        "pair": pair,
        "special_tokens": tokens,
    }


def truncate(content: dict[str, Any]) -> None:
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


def added(text: str) -> dict[str, Any]:
    """A special token in the longer form of tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"__type": "AddedToken", "content": text, **flags}


EDITS = {"plain": lambda _: None, "bos": add_bos, "truncating": truncate}
SETTINGS = {
    "named": {"bos_token": BOS, "eos_token": END},
    "asks_for_bos": {"bos_token": BOS, "eos_token": END, "add_bos_token": True},
    "objects": {"bos_token": added(BOS), "eos_token": added(END), "add_bos_token": False},
    "more": {"eos_token": END, "additional_special_tokens": ["return"], "pad_token": "<|new|>"},
    "listed": {
        "eos_token": END,
        "added_tokens_decoder": {"300": {"content": "<|later|>", "special": True}, "4": {"content": "%"}},
    },
}


def write(folder: Path, content: dict[str, Any], settings: dict[str, Any]) -> HuggingFaceTokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    return HuggingFaceTokenizer(folder)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_prompts_are_those_of_transformers(edit, settings, trained, tmp_path):
    from transformers import AutoTokenizer

    content = json.loads(json.dumps(trained))
    EDITS[edit](content)
    ours = write(tmp_path, content, SETTINGS[settings])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in PROMPTS:
        assert ours.encode_prompt(text) == theirs(text).input_ids, text
        assert ours.encode_prompt(text, is_rendered=True) == theirs(text, add_special_tokens=False).input_ids, text
    # Training data is encoded as before: special tokens in a text are text, and nothing is added or cut off.
    (as_text,) = ours.encode_batch([PROMPTS[2]])
    assert ours.decode(as_text) == PROMPTS[2]
    assert len(as_text) > len(ours.encode_prompt(PROMPTS[2])) + 10


def test_the_older_file_of_special_tokens(trained, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": END, "bos_token": {"content": BOS}}))
    ours = write(tmp_path, trained, {"chat_template": LLAMA})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.special["bos_token"], ours.eod) == (theirs.bos_token, theirs.eos_token_id)
    messages = [{"role": "user", "content": "f(x)"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert loaded(ours).encode_request({"messages": messages}) == expected


def loaded(tokenizer: Any, **fields: Any) -> LoadedModel:
    return LoadedModel(cfg=None, decoder=None, tokenizer=tokenizer, **fields)


CHATS = [
    [{"role": "user", "content": " f(x) & 'y' "}],
    [{"role": "system", "content": "def"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": END}],
    [{"role": "user", "content": "é", "tool_calls": None, "name": None}],
    [{"role": "user", "content": "x", "tool_calls": [{"name": "<f>", "a": "é"}]}],
]


@pytest.mark.parametrize("form", ["file", "entry", "list"])
@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
def test_chats_are_those_of_transformers(form, template, trained, tmp_path):
    from transformers import AutoTokenizer

    content = json.loads(json.dumps(trained))
    add_bos(content)  # must not be added to what the template writes
    settings: dict[str, Any] = dict(SETTINGS["named"])
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
        settings["chat_template"] = "another"
    elif form == "entry":
        settings["chat_template"] = template
    else:
        settings["chat_template"] = [{"name": "tool", "template": "t"}, {"name": "default", "template": template}]
    ours = write(tmp_path, content, settings)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in CHATS:
        assert render(ours, messages) == theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert loaded(ours).encode_request({"messages": messages}) == expected
    one = theirs.apply_chat_template([{"role": "user", "content": "f"}], add_generation_prompt=True, return_dict=False)
    assert loaded(ours).encode_request({"prompt": "f"}, chat=True) == one


def test_a_template_cannot_leave_its_sandbox_and_may_refuse(trained, tmp_path):
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    for name, template, problem in (("a", attack, "unsafe"), ("b", LLAMA, "no tools"), ("c", "{% if %}", "Expected")):
        tokenizer = write(tmp_path / name, trained, SETTINGS["named"] | {"chat_template": template})
        with pytest.raises(DataError, match=rf"refuses the messages.*{problem}"):
            render(tokenizer, [{"role": "tool", "content": "x"}])
    tokenizer = write(tmp_path / "d", trained, SETTINGS["named"])
    with pytest.raises(DataError, match="has no chat template"):
        loaded(tokenizer).encode_request({"prompt": "x"}, chat=True)
    with pytest.raises(DataError, match=r"\(bytes\) has no chat template"):
        loaded(BytesTokenizer()).encode_request({"prompt": "x"}, chat=True)


def test_plain_prompts_and_other_tokenizers(trained, tmp_path):
    tokenizer = write(tmp_path, trained, SETTINGS["named"])
    assert loaded(tokenizer).encode_request({"prompt": START}, plain=True) == tokenizer.encode_batch([START])[0]
    assert loaded(tokenizer).encode_request({"ids": [3, 4]}, chat=True) == [3, 4]
    assert loaded(BytesTokenizer()).encode_request({"prompt": "ab"}) == [97, 98]
    assert loaded(NullTokenizer(50)).encode_request({"prompt": "3 4"}) == [3, 4]
    with pytest.raises(DataError, match=r"\(null\) has no ids for the prompt 'abc'.*--tokenizer"):
        loaded(NullTokenizer(50)).encode_request({"prompt": "abc"})
    with pytest.raises(DataError, match=r"--prompt-ids.* The reason\. .*--tokenizer"):
        loaded(None, why_no_tokenizer="The reason.").encode_request({"prompt": "abc"})


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [121, 122]}, {"eos_token_id": 5}, {121, 122}),
        ({"eos_token_id": 7}, {}, {7}),
        ({}, {"eos_token_id": [5, 6]}, {5, 6}),
        (None, {"eos_token_id": 0}, {0}),
        (None, {"eos_token_id": None}, set()),
    ],
)
def test_the_ids_that_end_an_answer(generation, config, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_ids(tmp_path) == expected


def test_requests(tmp_path):
    file = tmp_path / "in.jsonl"
    rows = [{"prompt": "a", "id": 7}, {"messages": [{"role": "user", "content": "b"}]}, {"ids": [1, 2]}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_requests(file) == rows
    for line, problem in (
        ('{"prompt": 3}', "prompt = 3 has another form"),
        ('{"text": "a"}', "has none of"),
        ('{"prompt": "a", "ids": [1]}', "has prompt and ids of"),
        ('{"messages": []}', "messages = "),
        ('{"ids": [true]}', "ids = "),
        ("prompt", "is not JSON"),
        ("[1]", "has none of"),
    ):
        file.write_text(f'{{"prompt": "a"}}\n{line}\n')
        with pytest.raises(DataError, match=rf"in\.jsonl, line 2: {problem}"):
            read_requests(file)


def test_stop_strings():
    tokenizer = BytesTokenizer()
    stop = StopText(tokenizer.decode, ["\nUser:", "éé"])
    text = b"a long answer of several words\nUser: more"
    ended = next(n for n in range(1, len(text)) if stop(list(text[:n])))
    assert text[:ended] == b"a long answer of several words\nUser:"
    assert answer_text(tokenizer, list(text[:ended]), frozenset(), stop) == "a long answer of several words"
    assert stop(list("xéé".encode()))
    assert not stop(list("xé".encode()))


def test_a_stream_holds_back_what_may_be_a_stop(capsys):
    tokenizer, out = BytesTokenizer(), io.StringIO()
    streamer = Streamer(tokenizer, out, ends=frozenset({256}), stop=StopText(tokenizer.decode, ["###"]))
    seen = []
    for token in b"one # two ###":
        streamer(0, [token])
        seen.append(out.getvalue())
    streamer.close()
    assert out.getvalue() == "one # two "
    assert all("one # two ".startswith(text) for text in seen)
    out = io.StringIO()
    streamer = Streamer(tokenizer, out, ends=frozenset({256}), stop=StopText(tokenizer.decode, ["###"]))
    streamer(0, [*b"ends ##", 256])
    streamer.close()
    assert out.getvalue() == "ends ##"
