"""What commands print. Owns: JSON, tables, how numbers and times read. Must not know: where the values come from."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

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


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> None:
    """A borderless table, or the sentence `empty` when there is no row."""
    cells = list(rows)
    if not cells:
        console().print(escape(empty))
        return
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in cells:
        table.add_row(*(escape(cell) for cell in row))
    # A pipe has no width: let no column be cut there.
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 400)
    out.print(table)


def styled_status(status: str) -> str:
    """A job's status with its colour, as console markup."""
    style = _STYLES.get(status)
    return f"[{style}]{status}[/{style}]" if style else status


def number(value: Any, digits: int = 4) -> str:
    """A number for people; a dash when there is none."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


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
