"""YAML as data only: no tags, no anchors, no interpolation, no repeated keys, and `1e-4` is a number.

PyYAML's safe loader follows YAML 1.1, in which `no` is false and `1:30` is 90; here only true/false, decimal integers
and floats are recognised, as in YAML 1.2.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

from megatron_mtp.errors import ConfigError

RESOLVERS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+(?:_[0-9]+)*$", list("-+0123456789")),
    ("float", r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", list("-+0123456789.")),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
)


class Loader(yaml.SafeLoader):
    """Safe, with YAML 1.2's plain scalars; a repeated key and an alias are errors."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML reads it from the class

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # the stubs leave it out
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not supported", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if repeated := next((key for key, count in counts.items() if count > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.Node) -> int:
        return int(node.value)


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
        raise ConfigError(f"{origin}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # such as a tag !!int before text, or a number of many thousand digits
        raise ConfigError(f"{origin}: cannot be read as YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: is nested too deeply.") from None
    if "${" in text and _has_interpolation(data):
        raise ConfigError(f"{origin}: interpolation (${{...}}) is not supported. Write the value itself.")
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
