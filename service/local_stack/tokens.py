"""Tokens of a local stack. Owns: tokens.json, made once per data dir. Must not know: who checks them."""

import json
import os
import secrets
import tempfile
from pathlib import Path

from service.local_stack.interruption import StackError


def read_or_create_tokens(path: Path) -> dict[str, str]:
    """The local user's and the agent's token, 256 random bits each; created once per data dir, readable by its owner only."""
    try:
        tokens = json.loads(path.read_text())
        return {"user": tokens["user"], "agent": tokens["agent"]}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise StackError(f"{path} does not hold the two tokens; delete it, and `up` makes new ones") from error
    created = {"user": f"mr_{secrets.token_urlsafe(32)}", "agent": f"mr_{secrets.token_urlsafe(32)}"}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mode 0600 by definition
    with os.fdopen(handle, "w") as file:
        json.dump(created, file)
    os.replace(name, path)
    return created
