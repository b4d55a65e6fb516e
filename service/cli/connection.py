"""Where the service is.

Owns: --url, --token, --data-dir, and stack.json when nothing is given. Must not know:
commands.
"""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.failure import CommandError
from service.client import Client
from service.local_stack.record import RecordUnreadableError, StackRecord, read_record
from service.settings import Settings, SettingsError

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="Address of the service; the local stack's when not given.",
        rich_help_panel="Service",
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", help="Token, or @FILE that holds it.", rich_help_panel="Service"
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder of the local stack; MEGATRON_RAY_DATA_DIR or ~/.megatron-ray.",
        rich_help_panel="Service",
    ),
]


def resolve_data_dir(given: Path | None) -> Path:
    """The data dir asked for, or the one in the settings. Raises Failure."""
    if given is not None:
        return given.expanduser().absolute()
    try:
        return Settings.from_environment().data_dir
    except SettingsError as error:
        raise CommandError(str(error), remedy="correct the variable or unset it") from error


def local_stack(data_dir: Path) -> StackRecord | None:
    """What is recorded of the local stack. Raises Failure."""
    try:
        return read_record(data_dir)
    except RecordUnreadableError as error:
        raise CommandError(str(error)) from error


def connect(url: str | None, token: str | None, data_dir: Path | None) -> Client:
    """A client for the service asked for.

    Raises Failure when none is named and none is up here.
    """
    secret = _read_token(token)
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise CommandError(
                f"--url {url}: not an address", remedy="write it as http://host:port"
            )
        return Client(url, secret)
    folder = resolve_data_dir(data_dir)
    record = local_stack(folder)
    if record is None or not record.url:
        raise CommandError(
            f"no local stack is up (data dir {folder})",
            remedy="start one with `megatron-ray up`, or name a service with --url",
        )
    return Client(record.url, secret or record.token)


def _read_token(given: str | None) -> str | None:
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).expanduser().read_text().strip()
    except OSError as error:
        raise CommandError(
            f"--token {given}: {error.strerror}",
            remedy="name a file that holds the token alone",
        ) from error
