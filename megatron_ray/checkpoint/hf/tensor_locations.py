"""Describes where a logical tensor is stored in a Hugging Face checkpoint.

A family of models lists `Rule`s, which map each kind of logical name to its stored
tensor: whole or a part of it, transposed or with reordered rows.

Owns: those rules and their arithmetic on shapes and boxes. Pure. Must not know:
families, files, torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_ray.sharding.boxes import Box

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class InterleavedRotary:
    """Order of rows that rotary embedding pairs with their neighbours.

    In every block of `every` rows, the `width` rows from `first` on are rotated. Stored
    models pair rows 2i and 2i + 1 (transformers' `rope_interleave`), this library pairs
    i and i + width / 2.
    """

    every: int
    first: int
    width: int

    def stored_row(self, row: int) -> int:
        """Returns the row of the stored tensor for a logical row."""
        head, row_of_head = divmod(row, self.every)
        rotated_row = row_of_head - self.first
        if not 0 <= rotated_row < self.width:
            return row
        half = self.width // 2
        if rotated_row < half:
            stored = 2 * rotated_row
        else:
            stored = 2 * (rotated_row - half) + 1
        return head * self.every + self.first + stored

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yields rows [start, end) as (first logical row, first stored row, count).

        Rows that are adjacent in both orders form one run.
        """
        row = start
        while row < end:
            stored = self.stored_row(row)
            count = 1
            while row + count < end and self.stored_row(row + count) == stored + count:
                count += 1
            yield row, stored, count
            row += count


@dataclass(frozen=True)
class TensorLocation:
    """The stored tensor, or the part of it, that holds a logical tensor."""

    name: str
    """Name of the stored tensor."""
    part: int = 0
    parts: int = 1
    """The stored rows (columns where transposed) consist of `parts` equal parts; this
    is number `part`."""
    transposed: bool = False
    """Whether the tensor is stored as [inputs, outputs], as in GPT-2's Conv1D."""
    rotary: InterleavedRotary | None = None
    """Order of the stored rows, if different."""
    num_experts: int | None = None
    """Number of experts that the stored tensor's first dimension counts. `part` and
    `parts` are those of its first two dimensions as one."""

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the stored tensor for a logical shape."""
        whole = (shape[0] * self.parts, *shape[1:])
        if self.num_experts is not None:
            return (self.num_experts, whole[0] // self.num_experts, *shape[1:])
        if self.transposed:
            return whole[::-1]
        return whole

    def pieces(self, shape: Sequence[int], box: Box) -> Iterator[tuple[Box, Box]]:
        """Yields a box of the logical tensor as pairs of (logical box, stored box).

        The stored box of a transposed tensor is transposed too. That of a tensor of all
        experts has the first two dimensions as one.
        """
        start = box.offset[0]
        rows = box.size[0]
        runs: Iterable[tuple[int, int, int]] = [(start, start, rows)]
        if self.rotary is not None:
            runs = self.rotary.runs(start, start + rows)
        # Only rows are reordered, so each run is a box in both tensors.
        for logical_row, stored_row, count in runs:
            size = (count, *box.size[1:])
            offset = (stored_row + self.part * shape[0], *box.offset[1:])
            stored = Box(offset, size)
            if self.transposed:
                stored = Box(offset[::-1], size[::-1])
            yield Box((logical_row, *box.offset[1:]), size), stored


@dataclass(frozen=True)
class Rule:
    """Logical names of one kind, and their stored tensors.

    `{}` is a number, the same in both names.
    """

    logical: str
    stored: str
    part: int = 0
    parts: int = 1
    transposed: bool = False
    rotary: InterleavedRotary | None = None
    first_layer: int = 0
    """Added to the first number of the stored name."""
    num_experts: int | None = None
    """Number of experts in one stored tensor; the last number of the logical name is
    that of the expert, and `part` one of the `parts` of each."""

    def location(self, numbers: Sequence[str]) -> TensorLocation:
        """Returns the location of the tensor with these numbers in its name."""
        part = self.part
        parts = self.parts
        if self.num_experts is not None:
            part += int(numbers[-1]) * parts
            parts *= self.num_experts
        stored_numbers = list(numbers)
        if stored_numbers:
            stored_numbers[0] = str(int(stored_numbers[0]) + self.first_layer)
        return TensorLocation(
            self.stored.format(*stored_numbers),
            part,
            parts,
            self.transposed,
            self.rotary,
            self.num_experts,
        )


def find_locations(
    rules: Iterable[Rule], names: Iterable[str]
) -> dict[str, TensorLocation | None]:
    """Returns the location of each logical name, or None where no rule matches."""
    # Rules are looked up by the name with `{}` in place of its numbers.
    by_logical = {rule.logical: rule for rule in rules}
    locations: dict[str, TensorLocation | None] = {}
    for name in names:
        locations[name] = None
        rule = by_logical.get(_NUMBER.sub("{}", name))
        if rule is not None:
            locations[name] = rule.location(_NUMBER.findall(name))
    return locations


def linear(
    logical: str,
    stored: str,
    *,
    bias: bool = False,
    rotary: InterleavedRotary | None = None,
    first_layer: int = 0,
) -> list[Rule]:
    """Returns the rules of a weight and, optionally, of its bias."""
    kinds = ["weight"]
    if bias:
        kinds.append("bias")
    rules = []
    for kind in kinds:
        rules.append(
            Rule(
                f"{logical}.{kind}",
                f"{stored}.{kind}",
                rotary=rotary,
                first_layer=first_layer,
            )
        )
    return rules


def linears(pairs: Mapping[str, str], logical: str, stored: str) -> list[Rule]:
    """Returns the rules of weights that share two prefixes.

    `pairs` map the end of a logical name to the end of the stored name.
    """
    rules = []
    for logical_end, stored_end in pairs.items():
        rules += linear(logical + logical_end, stored + stored_end)
    return rules
