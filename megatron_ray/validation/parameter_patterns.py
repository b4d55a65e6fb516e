"""Checks patterns of parameters' names: every one must match a parameter.

Owns: the names that a model's patterns may match, and the suggestion of a near one. Pure.
Must not know: which fields hold patterns.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import translate

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.sharding.parameter_types import LocalParameter
from megatron_ray.sharding.parameters import local_parameters

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def whole_table(config: TrainConfig) -> tuple[LocalParameter, ...]:
    """Returns the parameters of the whole model.

    Names do not depend on the vocabulary, which may still be unknown, nor on the layout,
    so those of a single rank are listed.
    """
    vocab_size = config.model.vocab_size or 2
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    return local_parameters(model, ParallelDims(), 0)


def names_of(parameters: Sequence[LocalParameter]) -> list[str]:
    """Returns the names of all logical parameters, in the order of the table."""
    names = list[str]()
    for parameter in parameters:
        names.extend([part.logical.name for part in parameter.parts])
    return names


def unmatched_patterns(
    names: Sequence[str], patterns: Sequence[str], pointer: str
) -> list[Problem]:
    """Returns a problem for every pattern that matches none of the names."""
    problems = []
    for pattern in patterns:
        if _matches_any(pattern, names):
            continue
        detail = f"no parameter matches {pattern!r}; {_hint(names, pattern)}"
        problems.append(Problem(pointer, "unknown_parameter", detail))
    return problems


def _matches_any(pattern: str, names: Sequence[str]) -> bool:
    # Compiled once, since a model may have tens of thousands of names.
    is_match = re.compile(translate(pattern)).match
    return any(is_match(name) for name in names)


def _hint(names: Sequence[str], pattern: str) -> str:
    if pattern.startswith("head.") and not any(name.startswith("head.") for name in names):
        return "the head is tied to 'embedding.weight', so name that"
    close = get_close_matches(pattern, _candidates(names), n=1)
    # If another number would match, the name itself is spelt correctly.
    is_number_wrong = _matches_any(_NUMBER.sub("*", pattern), names)
    if close and not is_number_wrong:
        return f"did you mean {close[0]!r}? * matches any characters"
    block_name = next(name for name in names if name.startswith("layers."))
    return (
        f"names are such as {names[0]!r} and {block_name!r}, and * matches any characters"
    )


def _candidates(names: Sequence[str]) -> list[str]:
    """Returns one pattern for the parameters of all layers, and one for each module."""
    candidates = dict[str, None]()
    # Layers and experts differ in their numbers only, so few patterns cover all names.
    for form in dict.fromkeys(_NUMBER.sub("*", name) for name in names):
        parts = form.split(".")
        for length in range(len(parts) - 1, 0, -1):
            candidates[".".join([*parts[:length], "*"])] = None
        candidates[form] = None
    return list(candidates)
