"""Patterns of parameters' names: what matches, also in large models, and how quickly."""

from fnmatch import fnmatchcase

import pytest

from megatron_ray.validation.parameters.patterns import ParameterNames

NAMES = ["embedding.weight", "head.weight"]
for layer in range(12):
    NAMES += [f"layers.{layer}.attention.q.weight", f"layers.{layer}.norm.weight"]
    NAMES += [f"layers.{layer}.moe.experts.{expert}.up.weight" for expert in range(11)]
PATTERNS = [
    *("embedding.*", "*", "*.weight", "head.weight", "layers.*.norm.weight", "*.bias"),
    *("layers.3.*", "layers.11.*", "layers.12.*", "layers.1*", "layers.*0.*", "*.1?.*"),
    *("layers.?.norm.weight", "layers.??.norm.weight", "layers.???.norm.weight"),
    *("layers.[01].*", "layers.[!0-8].norm.*", "layers.1[2-9].*", "*.experts.10.*"),
    *("*.experts.11.*", "layers.9.moe.experts.9.up.weight", "layers.9.mlp.*", "layers.0"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_as_among_all_names(pattern: str) -> None:
    expected = any(fnmatchcase(name, pattern) for name in NAMES)
    assert ParameterNames(NAMES).has_match(pattern) == expected


def test_a_pattern_close_to_very_many_names_is_not_compared_with_all() -> None:
    names = [f"layers.{i}.moe.experts.{j}.up" for i in range(60) for j in range(256)]
    parameters = ParameterNames(names)
    assert parameters.has_match("layers.[0-9]*.experts.[0-9]*.up")
    assert not parameters.has_match("layers.[0-9]*.experts.[0-9]*.down")
    assert not parameters.has_match("layers.3.moe.experts.256.up")
