"""Re-exports torch's key-value stores.

Owns: the only import of names that torch does not declare as exports.
"""

from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

__all__ = [
    "HashStore",
    "PrefixStore",
    "Store",
    "TCPStore",
    "connected_store",
    "environment_store",
    "serve_store",
]


def serve_store(address: str) -> TCPStore:
    """Returns a new store that this process serves while it lives.

    `address` is one of this node, IPv4 or IPv6. The kernel chooses the port.
    """
    return TCPStore(address, 0, is_master=True, wait_for_workers=False)


def connected_store(host: str, port: int, timeout: timedelta) -> TCPStore:
    """Returns the store that another process serves. Raises RuntimeError."""
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def environment_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """Returns the store of torchrun's environment."""
    rendezvous = dist.rendezvous("env://", rank, world_size, timeout=timeout)  # type: ignore[attr-defined]
    store: Store
    store, _, _ = next(rendezvous)
    return store
