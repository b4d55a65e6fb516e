"""A recording that is as strict as a CUDA graph: what happens in Python when work is
recorded happens in no replay.

Replays run a copy of the work's objects as they were at the recording. Copies share all
tensors with the originals, so that replays change tensors and nothing else; and what Python
has changed since, or the replay before, does not reach them.
"""

import functools
import io
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from enum import Enum
from threading import local
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from megatron_ray.training.graphs.recordings import Work

_CONTAINERS = (dict, OrderedDict, defaultdict, list, tuple, set)


class FrozenRecording:
    """Work whose first replay is the recording itself; `replays` counts the others."""

    def __init__(self, work: Work) -> None:
        self.replays = 0
        self._work = work
        self._shared: list[Any] = []
        buffer = io.BytesIO()
        _Pickler(buffer, self._shared).dump(work)
        self._frozen = buffer.getvalue()
        self._result: Tensor | None = None

    def replay(self) -> Tensor:
        """Runs the work, or a copy of it."""
        if self._result is None:
            self._result = self._work()
            return self._result
        self.replays += 1
        copy: Work = _Unpickler(io.BytesIO(self._frozen), self._shared).load()
        # A graph has addresses, not tensors.
        self._result.copy_(copy())
        return self._result

    def release(self) -> None:
        """Keeps everything, for what tests still read."""


class _Pickler(pickle.Pickler):
    """Keeps the state of our objects, and references to all others."""

    def __init__(self, file: io.BytesIO, shared: list[Any]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._shared = shared
        self._positions: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if obj is None or isinstance(obj, str | int | float | bool) or _is_copied(obj):
            return None
        if id(obj) not in self._positions:
            self._positions[id(obj)] = len(self._shared)
            self._shared.append(obj)
        return self._positions[id(obj)]

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, MethodType):
            return MethodType, (obj.__func__, obj.__self__)
        if isinstance(obj, FunctionType):
            contents = tuple(cell.cell_contents for cell in obj.__closure__ or ())
            return _function, (_Reference(obj), contents)
        return NotImplemented


class _Reference:
    """Wraps a function that is not copied itself."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: list[Any]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, pid: int) -> Any:
        return self._shared[pid]


def _is_copied(obj: Any) -> bool:
    # What threads keep for themselves is there during a pass only.
    if isinstance(obj, type | Tensor | Enum | CodeType | _Reference | local):
        return False
    # Closures may have our objects in them.
    if isinstance(obj, FunctionType):
        return obj.__closure__ is not None
    if isinstance(obj, MethodType | functools.partial | nn.Module):
        return True
    if type(obj) in _CONTAINERS or hasattr(obj, "_fields"):
        return True
    return type(obj).__module__.startswith(("megatron_ray.", "tests."))


def _function(reference: _Reference, contents: tuple[Any, ...]) -> Callable[..., Any]:
    """A function with another closure."""
    function = reference.function
    copied = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(CellType(content) for content in contents),
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
