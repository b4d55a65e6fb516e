"""Resolves which service a command talks to.

Owns: --url, --token and --data-dir; without --url, the address in stack.json. Must not
know: commands.
"""

from pathlib import Path
from typing import Annotated

import typer

from megatron_ray.exceptions import redacted
from service.cli.failure import CommandError
from service.client import Client
from service.local_stack.record import RecordUnreadableError, StackRecord, read_record
from service.settings import Settings, SettingsError

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        help="Address of the service. Default: the local stack's.",
        rich_help_panel="Service",
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        help="Token, or @FILE to read it from a file. Default without --url: the local stack's.",
        rich_help_panel="Service",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder of the local stack. Default: $MEGATRON_RAY_DATA_DIR or ~/.megatron-ray.",
        rich_help_panel="Service",
    ),
]


def resolve_data_dir(data_dir: Path | None) -> Path:
    """Returns `data_dir` as an absolute path, or the data dir of the settings.

    Raises CommandError when a setting is invalid.
    """
    if data_dir is not None:
        return data_dir.expanduser().absolute()
    try:
        return Settings.from_environment().data_dir
    except SettingsError as error:
        raise CommandError(str(error), remedy="correct the variable or unset it") from error


def local_stack(data_dir: Path) -> StackRecord | None:
    """Returns the record of the local stack, or None.

    Raises CommandError when it cannot be read.
    """
    try:
        return read_record(data_dir)
    except RecordUnreadableError as error:
        raise CommandError(str(error)) from error


def connect(url: str | None, token: str | None, data_dir: Path | None) -> Client:
    """Returns a client of the service at `url`, or of the local stack.

    Raises CommandError when there is neither.
    """
    client = connect_if_up(url, token, data_dir)
    if client is None:
        raise CommandError(
            f"no local stack is up (data dir {resolve_data_dir(data_dir)})",
            remedy="start one with `megatron-ray up`, or set --url",
        )
    return client


def connect_if_up(
    url: str | None, token: str | None, data_dir: Path | None
) -> Client | None:
    """Returns a client of the service at `url`, or of the local stack if one is up."""
    secret = _read_token(token)
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise CommandError(
                f"--url {redacted(url)}: not an address",
                remedy="write it as http://host:port",
            )
        # The local stack's token is never sent to another service.
        return Client(url, secret)
    record = local_stack(resolve_data_dir(data_dir))
    # A stack that is starting has a record, but its address only when the service listens.
    if record is None or not record.url:
        return None
    return Client(record.url, secret or record.token)


def _read_token(option: str | None) -> str | None:
    # A file keeps the token out of the shell's history and the process list.
    if option is None or not option.startswith("@"):
        return option
    try:
        return Path(option[1:]).expanduser().read_text("utf-8-sig").strip()
    except OSError as error:
        raise CommandError(
            f"--token {option}: {error.strerror}",
            remedy="set it to a file that contains only the token",
        ) from error
