"""Makes and reads the tokens file.

Owns: the file's form and what a token is. Must not know: who checks tokens, the database.
"""

import json
import os
import secrets
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Any

from service.settings import SettingsError

MIN_TOKEN_CHARS = 32
_FORM = 'a JSON object {"user": "<token>", "agent": "<token>"}'
_REMEDY = "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"


class Scope(StrEnum):
    """The API that a token grants access to."""

    USER = "user"
    """The public API."""
    AGENT = "agent"
    """The agents' part of the internal API."""
    JOB = "job"
    """One job's part of the internal API."""


def new_token() -> str:
    """Returns a token of 256 random bits."""
    return secrets.token_urlsafe(32)


def write_tokens(path: Path) -> dict[Scope, str]:
    """Makes a tokens file (mode 0600) with one token for users and one for agents.

    The file is complete or not there at all. Raises FileExistsError.
    """
    if path.exists():
        raise FileExistsError(path)
    tokens = {Scope.USER: new_token(), Scope.AGENT: new_token()}
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # mkstemp makes files of mode 0600, so the tokens are never readable by others.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(tokens, file)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    return tokens


def read_or_create_tokens(path: Path) -> dict[Scope, str]:
    """Returns both tokens of a file, which is made when it is not there.

    Raises SettingsError when the file cannot be used or lacks one of them.
    """
    if not path.exists():
        return write_tokens(path)
    # A service works with one of them; a local stack needs both.
    tokens = read_tokens(path)
    if not {Scope.USER, Scope.AGENT} <= set(tokens):
        raise SettingsError(
            f"{path} must hold both tokens; delete it to have new ones made"
        )
    return tokens


def read_tokens(path: Path) -> dict[Scope, str]:
    """Returns the tokens of a file by scope.

    Raises SettingsError, whose text never contains a token.
    """
    content = _read_json(path)
    known_scopes = {Scope.USER, Scope.AGENT}
    if not isinstance(content, dict) or not content or not set(content) <= known_scopes:
        raise SettingsError(f"MEGATRON_RAY_TOKENS_FILE {path} must hold {_FORM}")
    tokens = {}
    for scope, token in content.items():
        # A dot separates the job's id from the signature in the tokens of jobs.
        if not isinstance(token, str) or len(token) < MIN_TOKEN_CHARS or "." in token:
            raise SettingsError(
                f"MEGATRON_RAY_TOKENS_FILE {path}: a token must have at least "
                f"{MIN_TOKEN_CHARS} characters and no dots; {_REMEDY}"
            )
        tokens[Scope(scope)] = token
    return tokens


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        reason = error.strerror
    except ValueError:
        reason = "not valid JSON"
    # Raised outside the handlers: what json complains about may hold a token.
    raise SettingsError(
        f"MEGATRON_RAY_TOKENS_FILE {path}: {reason}; the file must hold {_FORM}"
    )
