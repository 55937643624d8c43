"""The table of Megatron-Core's fields is the installed release's, and its rules name fields that exist."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from megatron_mtp.config import mcore_table
from megatron_mtp.config.mcore import rules as mcore_rules
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
    assert names >= mcore_rules.ENGINE
    for prefix in (*mcore_rules.UNSUPPORTED, *mcore_rules.TRANSFORMER_ENGINE_ONLY):
        assert any(name.startswith(prefix) for name in names), prefix


def test_defaults_have_their_own_type():
    from megatron_mtp.config.coerce import check

    for name, (wanted, default) in mcore_table.MCORE_FIELDS.items():
        if wanted is not None and not (name == "cuda_graph_modules" and default == "full"):
            check(default, wanted)
