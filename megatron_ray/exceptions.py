"""Defines the base classes of the library's exceptions and the kinds of failure.

Owns: the base classes, the kinds, and what a message may repeat of a URI. Torch-free.
Must not know: how callers handle failures.

Each exception is defined beside the code that raises it. The second column is its kind
or, if it inherits the kind, its module:

    MegatronRayError                  internal
    ├── InputError                    user
    │   ├── ConfigError               config.problem
    │   │   └── UnsupportedFieldError checkpoint.hf.families.family
    │   ├── UnusableJSONError         config.parsing.json_values
    │   ├── LayoutError               pipeline_parallel.schedules.layout
    │   ├── DamagedCorpusError        data.indexed
    │   ├── DataError                 data.preparation.errors
    │   ├── TokenizerError            data.tokenizer
    │   └── UnusableDataError         data.preparation.errors
    ├── StorageError                  storage (storage.errors)
    │   ├── InvalidLocationError      storage.errors
    │   ├── MissingFileError          storage.errors
    │   ├── AccessDeniedError         storage.errors
    │   ├── DiskFullError             storage.errors (disk_full)
    │   └── CheckpointError           checkpoint.directory
    │       ├── DamagedCheckpointError  checkpoint.directory (checkpoint)
    │       ├── NoWholeCheckpointError  checkpoint.resume_point (user)
    │       ├── MixedRunsError        checkpoint.resume_point (user)
    │       └── TakenOverError        checkpoint.claim (user)
    ├── NonFiniteLossError            numerics
    ├── RuleError                     training.rules.errors
    │   ├── RuleStopError             training.rules.errors (rule)
    │   ├── RollbackError             training.rules.errors (rollback)
    │   ├── RecheckError              training.rules.errors (recheck)
    │   └── RerunError                training.rules.errors
    ├── ReplicaError                  training.rules.replicas (replicas)
    │   └── FaultyReplicaError        training.rules.replicas (hardware)
    ├── RankOutOfMemoryError          memory
    ├── PeerLostError                 distributed.outside_group
    ├── ScheduleError                 pipeline_parallel.schedules.simulation
    └── WriteAbandonedError           checkpoint.writer
"""

import re
from enum import StrEnum
from typing import ClassVar

# A scheme is short: without a bound the cost of a long word would be its square.
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}:/?/)([^\s'\"<>]*)")
_HOST = re.compile(r"[A-Za-z0-9._-]*(:[0-9]{1,5})?")


def redacted(text: str) -> str:
    """Returns a text whose URIs are cut down to scheme, host and path.

    User info, queries and fragments may be secrets, which no message, log or database
    may contain.
    """
    return _URI.sub(_redacted_uri, text)


def _redacted_uri(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    # The sentence around a URI goes on with a comma, or ends.
    uri = rest.rstrip(",;:.)]}")
    shown = re.split("[?#]", uri, maxsplit=1)[0]
    # A secret may contain a slash itself, so nothing is shown after a doubtful host.
    if not _HOST.fullmatch(shown.partition("/")[0]):
        shown = "..."
    return f"{scheme}{shown}{rest[len(uri) :]}"


class ErrorKind(StrEnum):
    """The cause of an error, which determines whether a retry can help."""

    USER = "user"
    """The user's config, data or files; the message contains the field and the
    remedy."""
    STORAGE = "storage"
    """The storage of the job; a retry may succeed."""
    DISK_FULL = "disk_full"
    """The storage has no room; a retry would only repeat the error until files are
    deleted."""
    CHECKPOINT = "checkpoint"
    """A damaged checkpoint; a retry may succeed with an older one."""
    NUMERICS = "numerics"
    """The training itself, which a retry would only repeat."""
    RULE = "rule"
    """A rule of the config, which ends the run."""
    ROLLBACK = "rollback"
    """A rule of the config, by which the run goes on from an earlier state."""
    RECHECK = "recheck"
    """A step that may have been computed wrongly, and is to be computed elsewhere."""
    HARDWARE = "hardware"
    """A device that computes or keeps wrong numbers; a retry may succeed elsewhere."""
    REPLICAS = "replicas"
    """Replicas with different weights, of which none is known to be wrong."""
    MEMORY = "memory"
    """A rank needs more memory than there is, which a retry would only repeat."""
    INTERNAL = "internal"
    """Any other cause: a bug, or a lost peer."""


class MegatronRayError(Exception):
    """Base of every exception that the library defines; its text is redacted."""

    failure_kind: ClassVar[ErrorKind] = ErrorKind.INTERNAL

    def __init__(self, *arguments: object) -> None:
        shown = []
        for argument in arguments:
            if isinstance(argument, str):
                argument = redacted(argument)
            shown.append(argument)
        super().__init__(*shown)


class InputError(MegatronRayError):
    """A user's input cannot be used; the message names it and the remedy.

    A retry would fail in the same way.
    """

    failure_kind = ErrorKind.USER
