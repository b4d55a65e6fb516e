"""Passes rank 0's decisions to the other ranks before they have process groups.

Owns: the keys in the store for it. Must not know: what is decided.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from megatron_ray.data.preparation.errors import UnusableDataError
from megatron_ray.distributed.stores import Store
from megatron_ray.exceptions import ErrorKind, MegatronRayError
from workers.rank.messages import UserError

_TIMEOUT = timedelta(hours=24)
"""Longest wait for rank 0, which may be preparing data."""
_REFUSED = "refused"


class RefusedError(UserError):
    """The run cannot start; every rank raises it, and rank 0 has the message."""


class Announcements:
    """What rank 0 announces, in order; every rank reads all of it."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._count = 0

    def announce(self, kind: str, value: Any = None) -> None:
        """Sends a value as JSON to all other ranks."""
        message = json.dumps({"kind": kind, "value": value})
        self._store.set(f"announced/{self._count}", message)
        self._count += 1

    def receive(self) -> tuple[str, Any]:
        """Waits for the next announcement; returns its kind and value.

        Raises RefusedError when rank 0 cannot start the run, which it explains itself.
        """
        key = f"announced/{self._count}"
        self._store.wait([key], _TIMEOUT)
        self._count += 1
        message = json.loads(self._store.get(key))
        if message["kind"] == _REFUSED:
            raise RefusedError("rank 0 cannot start the run")
        return message["kind"], message["value"]

    @contextmanager
    def refusing_on_error(self) -> Iterator[None]:
        """Lets the other ranks end too when rank 0 finds that the run cannot start.

        Otherwise they would wait until torchrun kills them. Raises RefusedError.
        """
        try:
            yield
        except UnusableDataError as error:
            self.announce(_REFUSED)
            lines = ""
            for problem in error.problems:
                lines += f"\n  {problem.pointer}: {problem.detail}"
            raise RefusedError(f"the job cannot start:{lines}") from error
        except MegatronRayError as error:
            self.announce(_REFUSED)
            # A bug, which needs its traceback.
            if error.failure_kind is ErrorKind.INTERNAL:
                raise
            raise RefusedError(str(error)) from error

    def answer(self, value: str) -> None:
        """Sends this rank's answer to the last announcement."""
        self._store.set(f"answer/{self._count}/{self._rank}", value)

    def answers(self) -> list[str]:
        """Waits for the answers of all other ranks to the last announcement."""
        answers = []
        for rank in range(1, self._world_size):
            key = f"answer/{self._count}/{rank}"
            self._store.wait([key], _TIMEOUT)
            answers.append(self._store.get(key).decode())
        return answers
