"""What each pipeline stage holds.

Owns: Megatron's layout strings, even and uneven cuts. Pure; must not know: ranks,
torch.

A layout string lists the parts in order: `E` embedding, `t` decoder layer, `m`
multi-token-prediction layer, `L` head and loss; `|` ends a stage, `*n` repeats what
stands before it, parentheses group, commas and blanks mean nothing. `Et*3|(tt|)*29,m|L`
is 61 layers in 32 stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_ray.exceptions import InputError

_PARTS = "EtmL"
_MOST_PARTS = 100_000
_MOST_NESTING = 20


class LayoutError(InputError, ValueError):
    """A layout that cannot be; the text says what is wrong and what would be right,
    `field` which of `parallel` to change.
    """

    def __init__(self, text: str, field: str = "layout") -> None:
        super().__init__(text)
        self.field = field


@dataclass(frozen=True)
class StageContents:
    """Parts of one stage; layer numbers count from 0 over the whole model."""

    layers: tuple[int, ...] = ()
    embedding: bool = False
    loss: bool = False
    mtp_layers: tuple[int, ...] = ()

    def further(self, num_layers: int) -> tuple[int, ...]:
        """Numbers, in a model of so many layers, of those that predict further tokens."""
        return tuple(num_layers + depth for depth in self.mtp_layers)


def parse_layout(
    text: str, num_layers: int, num_mtp_layers: int = 0
) -> tuple[StageContents, ...]:
    """Stages of a layout string. Raises LayoutError."""
    stages: list[list[str]] = [[]]
    for part in _Parser(text).parts():
        if part == "|":
            stages.append([])
        else:
            stages[-1].append(part)
    if len(stages) > 1 and not stages[-1]:
        stages.pop()  # a bar at the very end ends the last stage
    _check(text, stages, num_layers, num_mtp_layers)
    contents = []
    layer = 0
    mtp = 0
    for parts in stages:
        layers = parts.count("t")
        mtps = parts.count("m")
        contents.append(
            StageContents(
                tuple(range(layer, layer + layers)),
                "E" in parts,
                "L" in parts,
                tuple(range(mtp, mtp + mtps)),
            ),
        )
        layer = layer + layers
        mtp = mtp + mtps
    return tuple(contents)


def split_into_stages(
    num_layers: int,
    num_stages: int,
    *,
    first: int | None = None,
    last: int | None = None,
    num_mtp_layers: int = 0,
) -> tuple[StageContents, ...]:
    """Equal stages, the first or last of another size where that is given.

    Raises LayoutError with the nearest sizes that would do.

    Multi-token-prediction layers are in the last stage, beside the loss they share.
    """
    given = [size for size in (first, last) if size is not None]
    middle = num_stages - len(given)
    others = num_layers - sum(given)
    if middle < 0 or others < 0 or (middle == 0 and others):
        text = (
            f"first_stage_layers and last_stage_layers ({given}) do not make up {num_layers} "
            f"layers in {num_stages} stages"
        )
        raise LayoutError(text, field="pp")
    if middle and others % middle:
        near = sum(given) + others - others % middle
        legal = f"{near} or {near + middle}" if near > sum(given) else f"{near + middle}"
        raise LayoutError(
            f"{others} layers do not divide evenly into {middle} stages; nearest: "
            f"num_layers={legal},"
            " or give first_stage_layers, last_stage_layers or a layout",
            field="pp",
        )
    sizes = [others // middle if middle else 0] * middle
    sizes = (
        ([first] if first is not None else [])
        + sizes
        + ([last] if last is not None else [])
    )
    starts = accumulate(sizes[:-1], initial=0)
    end = num_stages - 1
    return tuple(
        StageContents(
            tuple(range(start, start + size)),
            embedding=index == 0,
            loss=index == end,
            mtp_layers=tuple(range(num_mtp_layers)) if index == end else (),
        )
        for index, (start, size) in enumerate(zip(starts, sizes, strict=True))
    )


def _check(
    text: str, stages: Sequence[Sequence[str]], num_layers: int, num_mtp_layers: int
) -> None:
    parts = [part for stage in stages for part in stage]
    for part, name, wanted in (
        ("t", "decoder layers", num_layers),
        ("m", "multi-token-prediction layers", num_mtp_layers),
    ):
        if parts.count(part) != wanted:
            raise LayoutError(
                f"layout {text!r} has {parts.count(part)} {name} ({part!r}), the model has {wanted}"
            )
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
    if sum("m" in stage for stage in stages) > 1:
        raise LayoutError(
            f"layout {text!r} spreads multi-token-prediction layers over stages; put all "
            "'m' into one"
        )


class _Parser:
    """Recursive descent: sequence = item*, item = (part | bar | group) repeat?"""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def parts(self) -> list[str]:
        found = self._sequence(depth=0)
        if self._at < len(self._text):
            raise self._error("')' without '('")
        return found

    def _sequence(self, depth: int) -> list[str]:
        found: list[str] = []
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == ")":
                break
            self._at += 1
            if char in ", ":
                continue
            if char == "(":
                if depth == _MOST_NESTING:
                    raise self._error(f"more than {_MOST_NESTING} groups inside each other")
                item = self._sequence(depth + 1)
                if self._at == len(self._text):
                    raise self._error("'(' without ')'")
                self._at += 1
            elif char in _PARTS or char == "|":
                item = [char]
            else:
                self._at -= 1
                raise self._error(f"{char!r} is none of E, t, m, L, |, *, ( and )")
            times = self._repeat()
            if len(found) + len(item) * times > _MOST_PARTS:
                raise self._error(f"more than {_MOST_PARTS} parts")
            found += item * times
        return found

    def _repeat(self) -> int:
        if self._text[self._at : self._at + 1] != "*":
            return 1
        self._at += 1
        start = self._at
        while (
            self._text[self._at : self._at + 1].isascii()
            and self._text[self._at : self._at + 1].isdigit()
        ):
            self._at += 1
        digits = self._text[start : self._at]
        if not digits or len(digits) > 6:
            raise self._error(
                "'*' must be followed by how often, a number of at most six digits"
            )
        return int(digits)

    def _error(self, what: str) -> LayoutError:
        return LayoutError(f"layout {self._text!r}, position {self._at + 1}: {what}")
