"""docs/config.md is what the dataclasses say, and every field says what it means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_mtp.config import ConfigContainer
from megatron_mtp.config.base import RENAMED
from megatron_mtp.config.coerce import field_types
from megatron_mtp.config.sections import section_types
from scripts.config_doc import field_docs, render

pytestmark = pytest.mark.unit


def test_the_reference_has_not_drifted():
    written = (Path(__file__).parents[2] / "docs/config.md").read_text(encoding="utf-8")
    assert written == render(), "run python -m scripts.config_doc > docs/config.md"


@pytest.mark.parametrize("section", section_types().values(), ids=lambda section: section.SECTION)
def test_every_field_is_explained(section):
    assert set(field_docs(section)) == set(field_types(section))
    assert all(field_docs(section).values())


def test_the_guide_for_bridge_users_names_fields_that_exist():
    """In its tables the right column is ours; in its text every `cfg.` name is."""
    text = (Path(__file__).parents[2] / "docs/from_megatron_bridge.md").read_text(encoding="utf-8")
    ours = [line.split(" | ")[-1] if line.startswith("|") else line for line in text.splitlines()]
    names = re.findall(r"cfg\.(\w+)\.(\w+)", "\n".join(ours))
    sections = section_types()
    assert len(names) > 20
    for section, name in names:
        assert name in field_types(sections[section]), f"cfg.{section}.{name}"


@pytest.mark.parametrize("name", RENAMED)
def test_names_from_elsewhere_point_to_fields_that_exist(name):
    assert name not in field_types(ConfigContainer().model.__class__)
    for section, field in re.findall(r"(model)\.(\w+)", RENAMED[name]):
        assert field in field_types(section_types()[section])
