"""What commands print.

Owns: JSON, tables, how numbers and times read. Must not know: where the values come
from.
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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

_LEVELS = {"warn": "yellow", "error": "red"}
_STYLES = {"succeeded": "green", "running": "cyan", "failed": "red", "cancelled": "yellow"}


def console() -> Console:
    """A console on stdout as it is now."""
    return Console(highlight=False, soft_wrap=True)


def print_json(body: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(body, indent=2) + "\n")
    sys.stdout.flush()


def print_json_line(body: Any) -> None:
    """One JSON document on one line, at once."""
    sys.stdout.write(json.dumps(body) + "\n")
    sys.stdout.flush()


def print_page(
    page: Mapping[str, Any],
    as_json: bool,
    columns: Mapping[str, Column],
    empty: str,
    style: Column = lambda entry: "",
) -> None:
    """One page of a list, as it came or as a table: `columns` says how each cell is
    made of an entry, `style` a row's colour.
    """
    if as_json:
        print_json(page)
        return
    rows = [[cell(entry) for cell in columns.values()] for entry in page["data"]]
    print_table(list(columns), rows, empty, styles=[style(entry) for entry in page["data"]])


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    empty: str,
    styles: Sequence[str] = (),
) -> None:
    """A borderless table, or the sentence `empty` when there is no row; `styles` are
    the rows' colours.
    """
    cells = list(rows)
    if not cells:
        console().print(escape(empty))
        return
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row, style in itertools.zip_longest(cells, styles, fillvalue=""):
        table.add_row(*(escape(cell) for cell in row), style=style)
    # A pipe has no width: let no column be cut there.
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 400)
    out.print(table)


def styled_status(status: str) -> str:
    """A job's status with its colour, as console markup."""
    style = _STYLES.get(status)
    return f"[{style}]{status}[/{style}]" if style else status


def styled_level(level: str) -> str:
    """The colour of an event's level; none for what is no news."""
    return _LEVELS.get(level, "")


def moment(value: Any) -> str:
    """A time as the service gives it, to the second; as it is when it cannot be read."""
    try:
        return (
            datetime.fromisoformat(str(value))
            .astimezone(UTC)
            .strftime("%Y-%m-%d %H:%M:%SZ")
        )
    except ValueError:
        return str(value)


def number(value: Any, digits: int = 4) -> str:
    """A number for people; a dash when there is none."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def size(value: Any) -> str:
    """Bytes for people."""
    if value is None:
        return "-"
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def duration(seconds: float | None) -> str:
    """Seconds as h:mm:ss or m:ss; a dash when not known."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def nested(value: Mapping[str, Any], path: str) -> Any:
    """`a.b.c` of nested mappings; None where anything is missing."""
    node: Any = value
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node
