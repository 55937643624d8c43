"""YAML as data only: no tags, no anchors, no interpolation, no repeated keys, and `1e-4` is a number.

PyYAML's safe loader follows YAML 1.1, in which `no` is false and `1:30` is 90; here only true/false, decimal integers
and floats are recognised, as in YAML 1.2.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

from megatron_mtp.errors import SHOWN_LENGTH, ConfigError, cut, shown

RESOLVERS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+(?:_[0-9]+)*$", list("-+0123456789")),
    ("float", r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", list("-+0123456789.")),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
)


MAX_DEPTH = 20
"""No field holds anything near as deep; Python's own limit would end deep copies of the config later."""


class Loader(yaml.SafeLoader):
    """Safe, with YAML 1.2's plain scalars; tags, anchors, aliases, repeated keys and deep nesting are errors."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML reads it from the class

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it out
        if isinstance(event, yaml.AliasEvent):
            raise _refused("aliases (*name) are not supported", event)
        if getattr(event, "anchor", None) is not None:
            raise _refused("anchors (&name) are not supported", event)
        if getattr(event, "tag", None) is not None:
            raise _refused("tags (!name) are not supported", event)
        if self.depth > MAX_DEPTH:
            raise _refused(f"lists and mappings are nested more than {MAX_DEPTH} deep", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key in (key for key, count in counts.items() if count > 1):
            raise _refused(f"the key {shown(key)} is given twice", node)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.Node) -> int:
        return int(node.value)


def _refused(text: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=where.start_mark)


class Dumper(yaml.SafeDumper):
    """Quotes whatever `Loader` would not read back as text; writes no anchors."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML reads it from the class

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML writes these line breaks of Unicode as they are and reads them back as spaces, unless double-quoted
        style = '"' if any(char in text for char in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


for _tag, _pattern, _first in RESOLVERS:
    for _kind in (Loader, Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
Dumper.add_representer(str, Dumper.represent_text)
Dumper.add_multi_representer(list, Dumper.represent_list)  # also the frozen ones of a finalized config
Dumper.add_multi_representer(dict, Dumper.represent_dict)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def load_yaml(text: str, origin: str) -> Any:
    """Reads YAML.

    Args:
        text: the YAML.
        origin: the file or the argument it came from, for messages.

    Raises:
        ConfigError: it is no YAML, names a tag, repeats a key, or holds an interpolation (`${...}`).
    """
    try:
        data = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{cut(origin)}: cannot be read as YAML: {cut(text, 2 * SHOWN_LENGTH)}") from None
    except ValueError as error:  # a number of many thousand digits
        raise ConfigError(f"{cut(origin)}: cannot be read as YAML: {error}") from None
    if "${" in text and _has_interpolation(data):
        raise ConfigError(f"{cut(origin)}: interpolation (${{...}}) is not supported. Write the value itself.")
    return data


def dump_yaml(data: Any) -> str:
    """Writes plain data as YAML, keys in their order."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_inline(value: Any) -> str:
    """Writes one value on one line."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def _has_interpolation(data: Any) -> bool:
    if isinstance(data, dict):
        return any(_has_interpolation(key) or _has_interpolation(value) for key, value in data.items())
    if isinstance(data, list):
        return any(map(_has_interpolation, data))
    return isinstance(data, str) and "${" in data
