"""Options that choose jobs, and the jobs that they choose.

Must not know: commands.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from service.cli.failure import CommandError
from service.client import Client
from workers.protocol.states import JobState

PAGE = 100
"""Entries of one request: the service allows no more for jobs."""
JobId = Annotated[
    str,
    typer.Argument(help="Job id, as listed by `megatron-ray jobs`.", show_default=False),
]
JobIds = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[JOB_ID]...",
        help="Job ids, as listed by `megatron-ray jobs`.",
        show_default=False,
    ),
]
SomeJobIds = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB_ID...",
        help="Job ids, as listed by `megatron-ray jobs`.",
        show_default=False,
    ),
]
Statuses = Annotated[
    list[str] | None,
    typer.Option(
        "--status", help="Only jobs in this state; may be repeated. Default: all."
    ),
]
JobName = Annotated[
    str | None,
    typer.Option(
        "--name",
        help="Only jobs of this name; * stands for any characters. Default: all.",
    ),
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--metadata",
        metavar="LABEL=VALUE",
        help="Only jobs with this label; may be repeated. Default: all.",
    ),
]
Fetch = Callable[[str | None, int], dict[str, Any]]
"""Returns one page of a list, of (id to start after, entries per page)."""


def statuses(options: Sequence[str] | None) -> list[str]:
    """Returns the states of --status, which may be lists separated by commas.

    Raises CommandError for an unknown one.
    """
    known = [state.value for state in JobState]
    names = []
    for option in options or ():
        names += [name.strip() for name in option.split(",")]
    for name in names:
        if name not in known:
            raise CommandError(
                f"--status {name!r}: no such state",
                remedy=f"choose among {', '.join(known)}",
                exit_code=2,
            )
    return names


def labels(options: Sequence[str] | None) -> dict[str, str]:
    """Returns the labels of --metadata.

    Raises CommandError for one without a value.
    """
    values = {}
    for option in options or ():
        label, separator, value = option.partition("=")
        if not separator or not label:
            raise CommandError(
                f"--metadata {option!r}: expected label=value",
                remedy="write it as --metadata team=search",
                exit_code=2,
            )
        values[label] = value
    return values


@dataclass(frozen=True)
class JobChoice:
    """The jobs that match all that is given."""

    statuses: Sequence[str] = ()
    """States; empty: all."""
    name: str | None = None
    """Name, in which `*` stands for any characters."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def read(self, client: Client, limit: int | None = None) -> dict[str, Any]:
        """Returns up to `limit` of the jobs, or all of them, as one page, newest first."""

        def fetch(after: str | None, page_size: int) -> dict[str, Any]:
            return client.jobs(
                limit=page_size,
                after=after,
                status=",".join(self.statuses) or None,
                name=self.name,
                metadata=self.metadata,
            )

        return read_pages(fetch, limit)


def read_pages(fetch: Fetch, limit: int | None = None) -> dict[str, Any]:
    """Returns up to `limit` entries of a list, or all of them, as one page."""
    entries: list[Any] = []
    after: str | None = None
    while True:
        page_size = PAGE
        if limit is not None:
            page_size = min(PAGE, limit - len(entries))
        page = fetch(after, page_size)
        entries += page["data"]
        is_full = limit is not None and len(entries) >= limit
        # A page without entries ends the loop even if it claims that there are more.
        if not page.get("has_more") or is_full or not page["data"]:
            break
        after = page.get("last_id") or str(page["data"][-1]["id"])
    # One page that spans all that were fetched.
    merged = {**page, "data": entries, "first_id": None, "last_id": None}
    if entries:
        merged["first_id"] = str(entries[0]["id"])
        merged["last_id"] = str(entries[-1]["id"])
    return merged
