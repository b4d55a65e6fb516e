"""Checks patterns of parameters' names: every one must match a parameter.

Owns: the names that a model's patterns may match, and the suggestion of a near one. Pure.
Must not know: which fields hold patterns.
"""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import islice, product

from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.sharding.parameter_types import LocalParameter
from megatron_ray.sharding.parameters import local_parameters, name_matcher

_MAX_TRIED = 1000
"""Names that are compared with a pattern; a large model has tens of thousands."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_Numbers = tuple[str, ...]


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


class ParameterNames:
    """The names of a model's parameters, grouped by form.

    Names of one form differ in their numbers (of layers and experts) only, and have all
    combinations of them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        numbers: dict[str, list[dict[str, None]]] = {}
        for name in names:
            own_numbers = _NUMBER.findall(name)
            slots = numbers.setdefault(_NUMBER.sub("{}", name), [{} for _ in own_numbers])
            for slot, number in zip(slots, own_numbers, strict=True):
                slot[number] = None
        self._forms: dict[str, list[_Numbers]] = {}
        for form, slots in numbers.items():
            self._forms[form] = [tuple(slot) for slot in slots]

    def has_match(self, pattern: str) -> bool:
        """Returns whether a pattern matches one of the names.

        Returns True, unchecked, for a pattern that more than a thousand names are close to.
        """
        # Only numbers can prevent a match with a form that matches without them.
        forms = self._forms_like(pattern)
        is_match = name_matcher([pattern])
        tried = list(islice(self._candidates(forms, pattern), _MAX_TRIED))
        return len(tried) == _MAX_TRIED or any(is_match(name) for name in tried)

    def hint(self, pattern: str) -> str:
        """Returns what to write instead of a pattern that matches nothing."""
        if pattern.startswith("head.") and "head.weight" not in self._forms:
            return "the head is tied to 'embedding.weight', so name that"
        close = get_close_matches(pattern, self._patterns(), n=1)
        # If another number would match, the name itself is spelt correctly.
        if close and not self._forms_like(pattern):
            return f"did you mean {close[0]!r}? * matches any characters"
        block_name = next(name for name in self._names if name.startswith("layers."))
        return (
            f"names are such as {self._names[0]!r} and {block_name!r}, and * matches any "
            "characters"
        )

    def _forms_like(self, pattern: str) -> list[str]:
        """Returns the forms that a pattern matches when its numbers may be any."""
        is_match = name_matcher([re.sub(r"\[[^]]*\]|[0-9?]+", "*", pattern)])
        return [form for form in self._forms if is_match(form.format(*"0" * 9))]

    def _candidates(self, forms: Sequence[str], pattern: str) -> Iterator[str]:
        """Yields names of the forms whose numbers occur in a pattern, and some others.

        Where a pattern has no digit only the length of a number can matter, so one of
        each length is among them.
        """
        is_in_pattern = name_matcher([f"*{run}*" for run in re.findall(r"\d+", pattern)])
        chosen: dict[_Numbers, list[str]] = {}
        for form in forms:
            for numbers in self._forms[form]:
                if numbers not in chosen:
                    shortest = {len(number): number for number in reversed(numbers)}
                    chosen[numbers] = [
                        number
                        for number in numbers
                        if "[" in pattern
                        or shortest[len(number)] == number
                        or is_in_pattern(number)
                    ]
            for choice in product(*(chosen[numbers] for numbers in self._forms[form])):
                yield form.format(*choice)

    def _patterns(self) -> list[str]:
        """Returns one pattern for the parameters of all layers, and one for each module."""
        patterns = dict[str, None]()
        for form in self._forms:
            parts = form.replace("{}", "*").split(".")
            for length in range(len(parts) - 1, 0, -1):
                patterns[".".join([*parts[:length], "*"])] = None
            patterns[".".join(parts)] = None
        return list(patterns)


def unmatched_patterns(
    names: ParameterNames, patterns: Sequence[str], pointer: str
) -> list[Problem]:
    """Returns a problem for every pattern that matches none of the names."""
    problems = []
    for pattern in patterns:
        if not names.has_match(pattern):
            detail = f"no parameter matches {pattern!r}; {names.hint(pattern)}"
            problems.append(Problem(pointer, "unknown_parameter", detail))
    return problems
