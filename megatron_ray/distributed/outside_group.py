"""Connects processes of several worlds by gloo, through host memory.

Owns: the group, and leaving a collective whose other members have gone. Must not know:
how members find each other, what is sent.

torch's default process group is that of one world and ends with any of its ranks. A group
of this module can be lost and made again while the world goes on.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_ray.distributed.stores import PrefixStore, Store
from megatron_ray.exceptions import MegatronRayError

_POLL_S = 0.001
_WAIT_S = 0.01
_NO_TIMEOUT = timedelta(days=365)


class PeerLostError(MegatronRayError):
    """Another member of a group has gone, or does not answer."""


class OutsideGroup:
    """A group of `size` processes that use the same store.

    `address` is that of this process's node. `is_lost` is called while a collective runs;
    once it returns True, the collective is left; so is the wait for the other members.
    `timeout` is that of the connections. Raises PeerLostError.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        rank: int,
        size: int,
        address: str,
        timeout: timedelta,
        is_lost: Callable[[], bool],
    ) -> None:
        self._size = size
        self._is_lost = is_lost
        # Its stub lacks what torch itself uses.
        backend: Any = dist.ProcessGroupGloo
        options = backend._Options()
        options._devices = [backend.create_device(hostname=address, lazy_init=False)]
        # Of the connections; what runs later has none, and is left by `is_lost`.
        options._timeout = timeout
        own_store = PrefixStore(name, store)
        try:
            self._await_members(own_store, rank)
            self._backend = backend(own_store, rank, size, options)
        except RuntimeError as error:
            raise PeerLostError(f"not all of {size} jobs came: {error}") from error

    def _await_members(self, store: Store, rank: int) -> None:
        """Waits for the others, which connecting could only do until a timeout.

        Raises PeerLostError, RuntimeError.
        """
        store.set(f"here/{rank}", "")
        keys = [f"here/{index}" for index in range(self._size)]
        while not store.check(keys):
            if self._is_lost():
                raise PeerLostError("a job is lost")
            time.sleep(_WAIT_S)

    def mean(self, tensor: Tensor) -> None:
        """Replaces a tensor by its mean over the members. Raises PeerLostError."""
        options = dist.AllreduceOptions()
        options.timeout = _NO_TIMEOUT
        host = tensor.cpu()
        self._finish(self._backend.allreduce([host], options))
        # Elsewhere `host` is a copy.
        tensor.copy_(host).div_(self._size)

    def broadcast(self, tensor: Tensor) -> None:
        """Copies the first member's tensor in host memory to all. Raises PeerLostError."""
        if tensor.numel() == 0:
            return
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = _NO_TIMEOUT
        self._finish(self._backend.broadcast([tensor], options))

    def _finish(self, work: dist.Work) -> None:
        while not work.is_completed():
            if self._is_lost():
                self.abort()
                raise PeerLostError("a job is lost")
            time.sleep(_POLL_S)
        try:
            work.wait()
        except RuntimeError as error:
            raise PeerLostError(f"a job is lost: {error}") from error

    def abort(self) -> None:
        """Closes the connections; collectives that run elsewhere fail."""
        self._backend.abort()
