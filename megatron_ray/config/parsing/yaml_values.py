"""Reads YAML whose values mean what they mean in JSON.

Owns: which plain words are no text, after the core schema of YAML 1.2; keys that are given
twice. Pure. Must not know: any field.

In YAML 1.1, `no` is false, `010` is 8, `1:30` is 90 and `2024-01-01` is a date; in a JSON
spec none of them is.
"""

import re
from typing import Any

import yaml

from megatron_ray.config.parsing.json_values import repetition


class _Loader(yaml.SafeLoader):
    """Loads only plain types, as SafeLoader does."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Returns a mapping; raises ComposerError for a key that it has twice."""
        # Here and not where values are made: merged keys (<<) may be given again.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                message = repetition(key.value)
                raise yaml.composer.ComposerError(None, None, message, key.start_mark)
            seen.add((key.tag, key.value))
        return node


_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_REPLACED = (
    _BOOL,
    _INT,
    _FLOAT,
    "tag:yaml.org,2002:timestamp",
    "tag:yaml.org,2002:value",
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Returns the patterns of plain words by first character, without those of 1.1."""
    kept = {}
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        kept[first] = [item for item in resolvers if item[0] not in _REPLACED]
    return kept


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    # Leading zeros do not make a number octal.
    if text.lstrip("+-").isdigit():
        return int(text)
    return int(text, 0)


_Loader.yaml_implicit_resolvers = _resolvers()
_Loader.add_implicit_resolver(
    _BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    _INT,
    re.compile(r"^(?:[-+]?[0-9]{1,99}|0x[0-9a-fA-F]{1,98}|0o[0-7]{1,98})$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
_Loader.add_constructor(_INT, _construct_int)


def read_yaml(text: str) -> Any:
    """Returns the value of a YAML document. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)
