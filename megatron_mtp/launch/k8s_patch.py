"""Changes to a rendered Kubernetes Job, merged as `kubectl patch` would merge them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mtp.config.yaml_text import load_yaml
from megatron_mtp.errors import ConfigError, Problem

MERGE_KEYS = ("mountPath", "containerPort", "name")
"""Items of a list that agree in the first of these keys that they have are one item, as in Kubernetes."""


def read_patch(file: Path) -> dict[str, Any]:
    """A patch as plain data.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    try:
        patch = load_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--patch {file}: cannot be read ({error}).") from error
    if not isinstance(patch, dict):
        rule = "must hold a part of the Job, such as spec: {template: {spec: {...}}}"
        raise ConfigError(Problem(fields=("--patch",), value=str(file), rule=rule))
    return patch


def merged(whole: Any, patch: Any) -> Any:
    """`whole` with the values of `patch`: mappings are merged, null removes, named items of lists are merged.

    >>> merged({"a": 1, "b": [{"name": "x", "v": 1}]}, {"a": None, "b": [{"name": "x", "w": 2}, {"name": "y"}]})
    {'b': [{'name': 'x', 'v': 1, 'w': 2}, {'name': 'y'}]}
    """
    if isinstance(whole, dict) and isinstance(patch, dict):
        result = dict(whole)
        for key, value in patch.items():
            if value is None:
                result.pop(key, None)
            else:
                result[key] = merged(result.get(key, {} if isinstance(value, dict) else None), value)
        return result
    if isinstance(whole, list) and isinstance(patch, list) and all(isinstance(item, dict) for item in [*whole, *patch]):
        return _merged_lists(whole, patch)
    return patch


def _merged_lists(whole: list[dict[str, Any]], patch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    result = list(whole)
    for item in patch:
        key = next((key for key in MERGE_KEYS if key in item), None)
        at = next((i for i, other in enumerate(result) if key is not None and other.get(key) == item[key]), None)
        if at is None:
            result.append(item)
        else:
            result[at] = merged(result[at], item)
    return result
