"""The tokens file: how it is made and read.

Owns: its form, what a token is. Must not know: who checks tokens, the database.
"""

import json
import os
import secrets
import tempfile
from enum import StrEnum
from pathlib import Path

from service.settings import SettingsError

SHORTEST_TOKEN = 32


class Scope(StrEnum):
    """What a token is for."""

    USER = "user"
    AGENT = "agent"
    JOB = "job"


def new_token() -> str:
    """256 random bits."""
    return secrets.token_urlsafe(32)


def write_tokens(path: Path) -> dict[Scope, str]:
    """Makes a tokens file (mode 0600) with one token for the local user and one for the
    agent; whole or not at all.

    Raises FileExistsError.
    """
    if path.exists():
        raise FileExistsError(path)
    tokens = {scope: new_token() for scope in (Scope.USER, Scope.AGENT)}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=path.name
    )  # mode 0600 by definition
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(tokens, file)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    return tokens


def read_or_create_tokens(path: Path) -> dict[Scope, str]:
    """Both tokens of a file that is made when it is not there. Raises SettingsError."""
    tokens = read_tokens(path) if path.exists() else write_tokens(path)
    if not {Scope.USER, Scope.AGENT} <= set(tokens):
        raise SettingsError(
            f"{path} does not hold both tokens; delete it, and new ones are made"
        )
    return tokens


def read_tokens(path: Path) -> dict[Scope, str]:
    """Reads a tokens file.

    Raises SettingsError with what is wrong and never with a token.
    """
    wanted = 'a JSON object {"user": "<token>", "agent": "<token>"}'
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not valid JSON"
        raise SettingsError(
            f"MEGATRON_RAY_TOKENS_FILE {path}: {reason}; it must hold {wanted}"
        ) from None
    if (
        not isinstance(given, dict)
        or not given
        or not set(given) <= {Scope.USER, Scope.AGENT}
    ):
        raise SettingsError(f"MEGATRON_RAY_TOKENS_FILE {path} must hold {wanted}")
    if not all(
        isinstance(token, str) and len(token) >= SHORTEST_TOKEN and "." not in token
        for token in given.values()
    ):
        remedy = (
            "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
        raise SettingsError(
            f"MEGATRON_RAY_TOKENS_FILE {path}: a token has at least {SHORTEST_TOKEN} "
            f"characters and no dots; {remedy}"
        )
    return {Scope(scope): token for scope, token in given.items()}
