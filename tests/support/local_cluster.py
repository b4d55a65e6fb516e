"""A Ray cluster of several nodes: processes of this machine, in a folder of their own."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def local_cluster() -> Iterator[Any]:
    """Yields a `ray.cluster_utils.Cluster` with a head that has no CPUs; ends it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = Path(tempfile.mkdtemp(prefix="mr-", dir="/tmp"))
        # The cluster writes its address below this folder, which it does not make. In the
        # machine's own, a later `ray.init()` would read the address of a cluster that is gone.
        (folder / "ray").mkdir()
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")
        import ray
        from ray.cluster_utils import Cluster

        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "temp_dir": str(folder),
            "object_store_memory": 80 << 20,
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()  # type: ignore[no-untyped-call]
            shutil.rmtree(folder, ignore_errors=True)
