"""Renders a conversation with a tokenizer's chat template, as transformers does."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from megatron_mtp.data.tokenizer import HuggingFaceTokenizer
from megatron_mtp.errors import DataError

Message = dict[str, Any]


def chat_template(tokenizer: HuggingFaceTokenizer) -> str:
    """The template beside a tokenizer.json: chat_template.jinja, or the entry of tokenizer_config.json.

    Raises:
        DataError: there is none.
    """
    folder = tokenizer.path.parent
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = tokenizer.settings.get("chat_template")
    if isinstance(found, list):  # several templates with names
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if not isinstance(found, str):
        raise DataError(
            f"{folder}: the tokenizer has no chat template (neither chat_template.jinja nor chat_template in "
            "tokenizer_config.json). Give the prompt as text, with the markup of the model's training."
        )
    return found


def render(tokenizer: HuggingFaceTokenizer, messages: list[Message]) -> str:
    """The text of a conversation up to the beginning of the answer.

    Templates are code of the model's folder. They run in Jinja's sandbox, which keeps them from Python's internals.

    Args:
        messages: dicts with "role" and "content".

    Raises:
        DataError: there is no template, or it refuses the messages.
    """
    from jinja2 import TemplateError

    template = chat_template(tokenizer)
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        compiled = _environment().from_string(template)
        return compiled.render(
            messages=given, tools=None, documents=None, add_generation_prompt=True, **tokenizer.special
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{tokenizer.path.parent}: the chat template refuses the messages ({error}).") from error


def _environment() -> Any:
    """Jinja as transformers 5 sets it up (utils/chat_template_utils.py)."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks answers for training; in a prompt it has no effect."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's interface

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment
