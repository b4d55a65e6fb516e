"""Draws the coordinates of a muP check as SVG.

Owns: axes, lines and labels. Pure. Must not know: how they were measured.
"""

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log2, log10
from typing import Any

_PANEL_WIDTH = 380
_HEIGHT = 300
_LEFT = 56
_TOP = 34
_RIGHT = 110
_BOTTOM = 44
_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2")


class _Panel:
    """One plot with logarithmic axes; both panels have the same range."""

    def __init__(self, left: int, widths: Sequence[int], decades: tuple[int, int]) -> None:
        self._left = left
        self._widths = widths
        self._decades = decades
        self.parts: list[str] = []

    def x(self, width: int) -> float:
        """Returns the horizontal place of a width."""
        first = log2(self._widths[0])
        share = (log2(width) - first) / (log2(self._widths[-1]) - first)
        return self._left + share * _PANEL_WIDTH

    def y(self, change: float) -> float:
        """Returns the vertical place of a change."""
        low, high = self._decades
        share = (log10(change) - low) / (high - low)
        return _TOP + (1 - share) * _HEIGHT

    def text(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        """Adds a label."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def axes(self, title: str) -> None:
        """Adds the title, and a line per decade and a label per width."""
        self.text(self._left + _PANEL_WIDTH / 2, _TOP - 14, title)
        low, high = self._decades
        for decade in range(low, high + 1):
            y = self.y(10.0**decade)
            right = self._left + _PANEL_WIDTH
            self.parts.append(
                f'<path d="M{self._left} {y:.1f}H{right}" stroke="#ddd" fill="none"/>'
            )
            self.text(self._left - 8, y + 4, f"1e{decade}", "end")
        for width in self._widths:
            self.text(self.x(width), _TOP + _HEIGHT + 18, str(width))
        self.text(self._left + _PANEL_WIDTH / 2, _TOP + _HEIGHT + 36, "width")

    def line(self, coordinate: Mapping[str, Any], color: str) -> None:
        """Adds the line of a coordinate, with its name at the end."""
        points = []
        for width, change in zip(self._widths, coordinate["changes"], strict=True):
            points.append(f"{self.x(width):.1f},{self.y(change):.1f}")
        self.parts.append(
            f'<polyline points="{" ".join(points)}" stroke="{color}" stroke-width="2" '
            'fill="none"/>'
        )


def draw(check: Mapping[str, Any]) -> str:
    """Returns the SVG document of a check, with a panel for each parametrization."""
    decades = _decades((*check["mup"], *check["standard"]))
    # Room for the numbers of the second panel's axis.
    second = _LEFT + _PANEL_WIDTH + _LEFT + 14
    parts = []
    for left, title, name in (
        (_LEFT, "muP", "mup"),
        (second, "standard parametrization", "standard"),
    ):
        panel = _Panel(left, check["widths"], decades)
        panel.axes(f"{title}: change of activations after {check['steps']} steps")
        for index, coordinate in enumerate(check[name]):
            panel.line(coordinate, _color(index))
        parts += panel.parts
    legend_x = second + _PANEL_WIDTH + 14
    parts += _legend(legend_x, [coordinate["name"] for coordinate in check["mup"]])
    width = legend_x + _RIGHT
    height = _TOP + _HEIGHT + _BOTTOM
    content = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{content}\n</svg>\n'
    )


def _decades(coordinates: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Returns the powers of ten between which all changes are."""
    changes = []
    for coordinate in coordinates:
        changes += coordinate["changes"]
    low = floor(log10(min(changes)))
    return low, max(low + 1, ceil(log10(max(changes))))


def _legend(x: int, names: Sequence[str]) -> list[str]:
    parts = []
    for index, name in enumerate(names):
        y = _TOP + 10 + 18 * index
        parts.append(f'<path d="M{x} {y}h16" stroke="{_color(index)}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 22}" y="{y + 4}">{escape(name)}</text>')
    return parts


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]
