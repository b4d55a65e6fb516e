"""Names the entries of the cache of prepared data."""

import hashlib
import json

# Part of every name; to be increased when the same input yields another output.
_FORMAT = 1


def digest(*parts: object) -> str:
    """Returns the hash of JSON values that determine an entry."""
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:32]
