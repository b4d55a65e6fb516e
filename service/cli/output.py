"""Prints JSON and tables, and formats numbers and times.

Must not know: where the values come from.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Column = Callable[[Mapping[str, Any]], str]
"""Returns a cell's text for one entry of a list."""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]

_LEVELS = {"warn": "yellow", "error": "red"}
_STYLES = {"succeeded": "green", "running": "cyan", "failed": "red", "cancelled": "yellow"}
# Wide enough that no column is cut in a pipe, which has no width of its own.
_PIPE_WIDTH = 400


def console() -> Console:
    """Returns a console on the current stdout."""
    # Made anew each time: stdout may have been replaced, as tests do. soft_wrap leaves
    # long lines whole, so that they can be copied and searched.
    return Console(highlight=False, soft_wrap=True)


def print_json(body: Any) -> None:
    """Prints one JSON document."""
    sys.stdout.write(json.dumps(body, indent=2) + "\n")
    sys.stdout.flush()


def print_json_line(body: Any) -> None:
    """Prints one JSON document on one line, flushed for readers of a pipe."""
    sys.stdout.write(json.dumps(body) + "\n")
    sys.stdout.flush()


def print_page(
    page: Mapping[str, Any],
    as_json: bool,
    columns: Mapping[str, Column],
    empty: str,
    style: Column = lambda entry: "",
) -> None:
    """Prints one page of a list, as JSON or as a table.

    `columns` maps a heading to its cells, `style` returns the colour of a row.
    """
    if as_json:
        print_json(page)
        return
    rows: list[list[str]] = []
    styles: list[str] = []
    for entry in page["data"]:
        rows.append([cell(entry) for cell in columns.values()])
        styles.append(style(entry))
    print_table(list(columns), rows, empty, styles)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    empty: str,
    styles: Sequence[str] = (),
) -> None:
    """Prints a borderless table, or the sentence `empty` when there are no rows."""
    cells = list(rows)
    if not cells:
        console().print(escape(empty))
        return
    # Names and messages may contain brackets, which are markup to rich.
    headings = map(escape, columns)
    table = Table(*headings, box=None, pad_edge=False, header_style="bold")
    for row, style in itertools.zip_longest(cells, styles, fillvalue=""):
        table.add_row(*map(escape, row), style=style)
    width = None
    if not sys.stdout.isatty():
        width = _PIPE_WIDTH
    Console(highlight=False, width=width).print(table)


def print_note(text: str) -> None:
    """Prints a line about what was printed before it."""
    console().print(f"[dim]{escape(text)}[/dim]")


def styled_status(status: str) -> str:
    """Returns a job's status as console markup."""
    style = _STYLES.get(status)
    if style is None:
        return status
    return f"[{style}]{status}[/{style}]"


def styled_level(level: str) -> str:
    """Returns the colour of an event's level; empty for debug and info."""
    return _LEVELS.get(level, "")


def moment(value: Any) -> str:
    """Returns an ISO time in UTC to the second, or `value` when it is not a time."""
    try:
        # UTC: the service and its readers may be in different time zones.
        at = datetime.fromisoformat(str(value)).astimezone(UTC)
    except ValueError:
        return str(value)
    return at.strftime("%Y-%m-%d %H:%M:%SZ")


def number(value: Any, digits: int = 4) -> str:
    """Returns a number with separators; a dash for None."""
    if value is None:
        return "-"
    # Counts are exact, so they get no digits after the point.
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}f}"


def short_number(value: float | None) -> str:
    """Returns a number with three digits and a decimal unit; a dash for None."""
    if value is None:
        return "-"
    if value < 1000:
        return f"{value:.0f}"
    for unit in ("k", "M"):
        value /= 1000
        if value < 1000:
            return f"{value:.3g}{unit}"
    return f"{value / 1000:.3g}G"


def size(value: Any) -> str:
    """Returns a number of bytes in a binary unit; a dash for None."""
    if value is None:
        return "-"
    amount = float(value)
    if amount < 1024:
        return f"{amount:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if amount < 1024:
            return f"{amount:.1f} {unit}"
    return f"{amount / 1024:.1f} TiB"


def duration(seconds: float | None) -> str:
    """Returns seconds as m:ss, h:mm:ss or, from one day on, days and hours."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_of_day = divmod(hours, 24)
    if days:
        return f"{days}d {hours_of_day}h"
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"


def age(moment: Any) -> str:
    """Returns the time since an ISO time; a dash when it is none."""
    # By this machine's clock, which may differ from the service's.
    try:
        then = datetime.fromisoformat(str(moment))
    except ValueError:
        return "-"
    return duration((datetime.now(UTC) - then).total_seconds())


def coordinates(entry: Mapping[str, Any]) -> str:
    """Returns a rank's coordinates, such as `tp0 dp1`."""
    axes = entry.get("coordinates") or {}
    return " ".join(f"{axis}{index}" for axis, index in axes.items())


def nested(value: Mapping[str, Any], path: str) -> Any:
    """Returns `a.b.c` of nested mappings, or None where a part is missing."""
    node: Any = value
    for key in path.split("."):
        if not isinstance(node, Mapping):
            return None
        node = node.get(key)
    return node
