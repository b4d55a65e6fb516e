"""Determines the contents of each pipeline stage.

Owns: Megatron's layout strings, even and uneven splits. Pure; must not know: ranks,
torch.

A layout string lists the parts in order: `E` embedding, `t` decoder layer, `m`
multi-token-prediction layer, `L` head and loss; `|` ends a stage, `*n` repeats the
preceding item, parentheses group, commas and blanks are ignored. `Et*3|(tt|)*29,m|L`
has 61 layers in 32 stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_ray.exceptions import InputError

_PARTS = "EtmL"
# A short string can expand to any number of parts, so both are limited.
_MAX_PARTS = 100_000
_MAX_NESTING = 20


class LayoutError(InputError, ValueError):
    """A layout is invalid; the message contains the problem and the remedy.

    `field` is the field of `parallel` to change.
    """

    def __init__(self, text: str, field: str = "layout") -> None:
        super().__init__(text)
        self.field = field


@dataclass(frozen=True)
class StageContents:
    """The parts of one stage; layer numbers count from 0 over the whole model."""

    layers: tuple[int, ...] = ()
    embedding: bool = False
    loss: bool = False
    mtp_layers: tuple[int, ...] = ()
    """Multi-token-prediction layers, counted from 0 separately."""

    def mtp_layer_numbers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the numbers of its MTP layers, counted after the decoder layers."""
        return tuple(num_layers + depth for depth in self.mtp_layers)


def parse_layout(
    text: str, num_layers: int, num_mtp_layers: int = 0
) -> tuple[StageContents, ...]:
    """Returns the stages of a layout string. Raises LayoutError."""
    stages: list[list[str]] = [[]]
    for part in _Parser(text).parse():
        if part == "|":
            stages.append([])
        else:
            stages[-1].append(part)
    # A bar at the end closes the last stage and does not start another.
    if len(stages) > 1 and not stages[-1]:
        stages.pop()
    _check_counts(text, stages, num_layers, num_mtp_layers)
    _check_order(text, stages)
    contents = []
    layer = 0
    mtp_layer = 0
    for parts in stages:
        next_layer = layer + parts.count("t")
        next_mtp_layer = mtp_layer + parts.count("m")
        contents.append(
            StageContents(
                tuple(range(layer, next_layer)),
                embedding="E" in parts,
                loss="L" in parts,
                mtp_layers=tuple(range(mtp_layer, next_mtp_layer)),
            ),
        )
        layer = next_layer
        mtp_layer = next_mtp_layer
    return tuple(contents)


def split_into_stages(
    num_layers: int,
    num_stages: int,
    *,
    first: int | None = None,
    last: int | None = None,
    num_mtp_layers: int = 0,
) -> tuple[StageContents, ...]:
    """Returns equal stages, except for given sizes of the first or last one.

    Multi-token-prediction layers are in the last stage, because they use its head.
    Raises LayoutError with the nearest valid sizes.
    """
    sizes = _stage_sizes(num_layers, num_stages, first, last)
    contents = []
    start = 0
    for stage, size in enumerate(sizes):
        is_last = stage == num_stages - 1
        contents.append(
            StageContents(
                tuple(range(start, start + size)),
                embedding=stage == 0,
                loss=is_last,
                mtp_layers=tuple(range(num_mtp_layers)) if is_last else (),
            )
        )
        start += size
    return tuple(contents)


def _stage_sizes(
    num_layers: int, num_stages: int, first: int | None, last: int | None
) -> list[int]:
    """Returns the number of layers of each stage. Raises LayoutError."""
    given = [size for size in (first, last) if size is not None]
    num_middle = num_stages - len(given)
    num_others = num_layers - sum(given)
    fits = num_middle >= 0 and num_others >= 0
    if not fits or (num_middle == 0 and num_others > 0):
        raise LayoutError(
            f"first_stage_layers and last_stage_layers ({given}) do not make up {num_layers} "
            f"layers in {num_stages} stages",
            field="pp",
        )
    middle_size = 0
    if num_middle > 0:
        middle_size, left_over = divmod(num_others, num_middle)
        if left_over > 0:
            _refuse_uneven(num_layers, num_others, num_middle)
    sizes = [middle_size] * num_middle
    if first is not None:
        sizes.insert(0, first)
    if last is not None:
        sizes.append(last)
    return sizes


def _refuse_uneven(num_layers: int, num_others: int, num_middle: int) -> NoReturn:
    """Raises LayoutError with the numbers of layers that would divide evenly."""
    below = num_layers - num_others % num_middle
    nearest = f"{below + num_middle}"
    # The next lower number may leave no layers for the middle stages.
    if num_others >= num_middle:
        nearest = f"{below} or {nearest}"
    raise LayoutError(
        f"{num_others} layers do not divide evenly into {num_middle} stages; nearest: "
        f"num_layers={nearest}, or give first_stage_layers, last_stage_layers or a layout",
        field="pp",
    )


def _check_counts(
    text: str, stages: Sequence[Sequence[str]], num_layers: int, num_mtp_layers: int
) -> None:
    """Raises LayoutError unless the layout has the model's layers."""
    for part, name, expected in (
        ("t", "decoder layers", num_layers),
        ("m", "multi-token-prediction layers", num_mtp_layers),
    ):
        count = 0
        for stage in stages:
            count += stage.count(part)
        if count != expected:
            raise LayoutError(
                f"layout {text!r} has {count} {name} ({part!r}), the model has {expected}"
            )


def _check_order(text: str, stages: Sequence[Sequence[str]]) -> None:
    """Raises LayoutError unless the parts are in the order of a forward pass."""
    parts: list[str] = []
    num_mtp_stages = 0
    for stage in stages:
        parts += stage
        num_mtp_stages += "m" in stage
    if parts.count("E") != 1 or parts[0] != "E":
        raise LayoutError(
            f"layout {text!r} must begin with the embedding 'E', and have it once"
        )
    if parts.count("L") != 1 or parts[-1] != "L":
        raise LayoutError(f"layout {text!r} must end with the loss 'L', and have it once")
    if "m" in parts and "t" in parts[parts.index("m") :]:
        raise LayoutError(
            f"layout {text!r} has a decoder layer behind a multi-token-prediction layer; "
            "put all 'm' behind the last 't'"
        )
    if num_mtp_stages > 1:
        raise LayoutError(
            f"layout {text!r} spreads multi-token-prediction layers over stages; put all "
            "'m' into one"
        )


class _Parser:
    """Parses by recursive descent: sequence = item*, item = (part | bar | group) repeat?"""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def parse(self) -> list[str]:
        """Returns the parts and bars with repeats expanded."""
        parts = self._sequence(depth=0)
        # A sequence ends at a closing parenthesis, which the outermost sequence cannot
        # have.
        if self._position < len(self._text):
            raise self._error("')' without '('")
        return parts

    def _sequence(self, depth: int) -> list[str]:
        parts: list[str] = []
        while self._peek() not in ("", ")"):
            char = self._peek()
            if char in ", ":
                self._position += 1
                continue
            item = self._item(depth)
            times = self._repeat()
            # Checked before expansion, because of strings such as
            # '(((t*999999)*999999)*999999)'.
            if len(parts) + len(item) * times > _MAX_PARTS:
                raise self._error(f"more than {_MAX_PARTS} parts")
            parts += item * times
        return parts

    def _item(self, depth: int) -> list[str]:
        char = self._peek()
        if char == "(":
            return self._group(depth)
        if char not in _PARTS and char != "|":
            raise self._error(f"{char!r} is none of E, t, m, L, |, *, ( and )")
        self._position += 1
        return [char]

    def _group(self, depth: int) -> list[str]:
        self._position += 1
        if depth == _MAX_NESTING:
            raise self._error(f"more than {_MAX_NESTING} groups inside each other")
        parts = self._sequence(depth + 1)
        if self._peek() != ")":
            raise self._error("'(' without ')'")
        self._position += 1
        return parts

    def _repeat(self) -> int:
        """Returns the number after a '*'; 1 without one."""
        if self._peek() != "*":
            return 1
        self._position += 1
        start = self._position
        # isdigit alone accepts digits of other scripts, which int() accepts too.
        while self._peek().isascii() and self._peek().isdigit():
            self._position += 1
        digits = self._text[start : self._position]
        if not digits or len(digits) > 6:
            raise self._error(
                "'*' must be followed by how often, a number of at most six digits"
            )
        return int(digits)

    def _peek(self) -> str:
        """Returns the next character; empty at the end."""
        return self._text[self._position : self._position + 1]

    def _error(self, problem: str) -> LayoutError:
        return LayoutError(
            f"layout {self._text!r}, position {self._position + 1}: {problem}"
        )
