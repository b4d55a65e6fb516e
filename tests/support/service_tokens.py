"""The tokens of services that tests start."""

import json
from pathlib import Path

USER_TOKEN = "u" * 43
AGENT_TOKEN = "a" * 43


def tokens_file(folder: Path) -> Path:
    """Writes both tokens to a file in the folder, which only its owner may read."""
    path = folder / "tokens.json"
    path.write_text(json.dumps({"user": USER_TOKEN, "agent": AGENT_TOKEN}))
    path.chmod(0o600)
    return path
