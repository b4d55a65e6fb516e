"""Re-exports torch's key-value stores.

Owns: the only import of names that torch does not declare as exports.
"""

from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

__all__ = ["HashStore", "PrefixStore", "Store", "TCPStore", "environment_store"]


def environment_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """Returns the store of torchrun's environment."""
    rendezvous = dist.rendezvous("env://", rank, world_size, timeout=timeout)  # type: ignore[attr-defined]
    store: Store
    store, _, _ = next(rendezvous)
    return store
