"""torch's key-value stores under their public names.

Owns: the one place that knows torch does not declare them as exports.
"""

from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

__all__ = ["HashStore", "PrefixStore", "Store", "TCPStore", "environment_store"]


def environment_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """The store that torchrun's environment names."""
    store: Store = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))[0]  # type: ignore[attr-defined]
    return store
