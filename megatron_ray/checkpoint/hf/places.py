"""Where a logical tensor lies in the tensors of a Hugging Face checkpoint.

Owns: that statement as data, and its arithmetic on shapes and boxes. Pure; must not
know: families, files, torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_ray.sharding.boxes import Box

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Rotary:
    """Rows in an order of their own: of every `every` rows those from `first` on,
    `width` in all, are rotated in neighbouring pairs (2i, 2i + 1) there and in halves
    (i, i + width / 2) here (transformers' `rope_interleave`).
    """

    every: int
    first: int
    width: int

    def stored_row(self, row: int) -> int:
        """Row of the stored tensor that is `row` here."""
        head, within = divmod(row, self.every)
        turned = within - self.first
        if not 0 <= turned < self.width:
            return row
        half = self.width // 2
        pair = 2 * turned if turned < half else 2 * (turned - half) + 1
        return head * self.every + self.first + pair

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Rows [start, end) as (first row here, first row there, count), neighbours
        together where the order is the same.
        """
        row = start
        while row < end:
            there = self.stored_row(row)
            count = 1
            while row + count < end and self.stored_row(row + count) == there + count:
                count += 1
            yield row, there, count
            row += count


@dataclass(frozen=True)
class Place:
    """A logical tensor as a part of a stored one."""

    name: str
    """Of the stored tensor."""
    part: int = 0
    parts: int = 1
    """Stored rows (columns where transposed) are that many equal parts, of which this
    is one."""
    transposed: bool = False
    """Stored as [inputs, outputs] (GPT-2's Conv1D)."""
    rotary: Rotary | None = None

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the stored tensor for a logical one."""
        whole = (shape[0] * self.parts, *shape[1:])
        return whole[::-1] if self.transposed else whole

    def pieces(self, shape: Sequence[int], box: Box) -> Iterator[tuple[Box, Box]]:
        """A box of the logical tensor as (box here, box there) pairs; where transposed
        the second is still to be turned.
        """
        start = box.offset[0]
        rows = box.size[0]
        runs = (
            [(start, start, rows)]
            if self.rotary is None
            else self.rotary.runs(start, start + rows)
        )
        for here, there, count in runs:
            offset = (there + self.part * shape[0], *box.offset[1:])
            size = (count, *box.size[1:])
            stored = Box(offset[::-1], size[::-1]) if self.transposed else Box(offset, size)
            yield Box((here, *box.offset[1:]), size), stored


@dataclass(frozen=True)
class Rule:
    """Logical names of one kind and where they are stored.

    `{}` stands for a number, the same in both.
    """

    logical: str
    stored: str
    part: int = 0
    parts: int = 1
    transposed: bool = False
    rotary: Rotary | None = None
    first_layer: int = 0
    """Added to the first number on the stored side."""

    def place(self, numbers: Sequence[str]) -> Place:
        """Where the tensor with these numbers in its name lies."""
        shifted = [str(int(numbers[0]) + self.first_layer), *numbers[1:]] if numbers else []
        return Place(
            self.stored.format(*shifted),
            self.part,
            self.parts,
            self.transposed,
            self.rotary,
        )


def find_places(rules: Iterable[Rule], names: Iterable[str]) -> dict[str, Place | None]:
    """The place of each logical name; None where no rule speaks of it."""
    table = {rule.logical: rule for rule in rules}
    found: dict[str, Place | None] = {}
    for name in names:
        rule = table.get(_NUMBER.sub("{}", name))
        found[name] = rule.place(_NUMBER.findall(name)) if rule is not None else None
    return found


def linear(logical: str, stored: str, *, bias: bool = False) -> list[Rule]:
    """Rules of a weight and, where asked for, its bias."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Rule(f"{logical}.{kind}", f"{stored}.{kind}") for kind in kinds]


def linears(pairs: Mapping[str, str], logical: str, stored: str) -> list[Rule]:
    """Weights by their last names, below two prefixes."""
    return [
        rule
        for ours, theirs in pairs.items()
        for rule in linear(logical + ours, stored + theirs)
    ]
