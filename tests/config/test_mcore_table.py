"""The table of Megatron-Core's fields is the installed release's, and its rules name fields that exist."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from megatron_mtp.config import mcore_table
from megatron_mtp.config.knob import mcore_fields
from megatron_mtp.config.mcore import rules as mcore_rules
from megatron_mtp.config.sections import ModelConfig
from scripts.mcore_table import render

pytestmark = pytest.mark.unit


def test_the_table_has_not_drifted():
    fresh: dict = {}
    exec(render(), fresh)
    assert version("megatron-core") == mcore_table.MCORE_VERSION
    assert fresh["MCORE_FIELDS"] == mcore_table.MCORE_FIELDS, "run python -m scripts.mcore_table"


def test_every_rule_names_a_field():
    names = set(mcore_table.MCORE_FIELDS)
    assert set(mcore_rules.OWNED) <= names
    assert names >= mcore_rules.SET_AT_BUILD
    for prefix in (*mcore_rules.UNSUPPORTED, *mcore_rules.TRANSFORMER_ENGINE_ONLY):
        assert any(name.startswith(prefix) for name in names), prefix


def test_defaults_have_their_own_type():
    from megatron_mtp.config.coerce import check

    for name, (wanted, default) in mcore_table.MCORE_FIELDS.items():
        if wanted is not None and not (name == "cuda_graph_modules" and default == "full"):
            check(default, wanted)


def test_what_a_field_says_about_megatron_core_is_so():
    """Fields that go under their own name exist there; a field that both sides have is passed on."""
    from dataclasses import fields

    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    all_kinds, plain_kinds = ("same", "moe", "mla", "own"), ("same", "moe")
    for config_class, kinds in ((MLATransformerConfig, ("same", "moe", "mla")), (TransformerConfig, plain_kinds)):
        assert set(mcore_fields(ModelConfig, kinds)) <= {field.name for field in fields(config_class)}
    both = {field.name for field in fields(MLATransformerConfig)} & {field.name for field in fields(ModelConfig)}
    # The objective weighs the losses itself.
    assert both - set(mcore_fields(ModelConfig, all_kinds)) == {"mtp_loss_scaling_factor"}
