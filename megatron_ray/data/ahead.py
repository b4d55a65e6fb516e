"""Computes values ahead of their use.

Owns: the thread that computes them. Must not know: what is computed.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Ahead(Generic[Value]):
    """Computes the next value while the one before it is in use.

    `compute` is called with one key at a time, always on the same thread.
    """

    def __init__(self, compute: Callable[[int], Value]) -> None:
        self._compute = compute
        # Has no thread until the first value is computed, and ends with this object.
        self._executor = ThreadPoolExecutor(1, "ahead")
        self._key: int | None = None
        self._value: Future[Value]

    def take(self, key: int, following: int) -> Value:
        """Returns the value of a key, and begins with that of the `following` one.

        It is there at once if `key` was the following one of the last call. Raises what
        computing it has raised.
        """
        self._begin(key)
        value = self._value.result()
        self._begin(following)
        return value

    def _begin(self, key: int) -> None:
        if key != self._key:
            self._key = key
            self._value = self._executor.submit(self._compute, key)
