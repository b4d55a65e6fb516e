"""A small Ray cluster and a stand-in for the service."""

import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fake_service import NAMESPACE, FakeService


@pytest.fixture(scope="module")
def ray_cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a cluster of this module's own: 4 CPUs, its NUM_GPUS in Ray's books,
    no dashboard, gone afterwards.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")
        import ray

        folder = tempfile.mkdtemp(prefix="mr-", dir="/tmp")
        context: Any = ray.init(
            address="local",
            num_cpus=4,
            num_gpus=getattr(request.module, "NUM_GPUS", 0),
            include_dashboard=False,
            log_to_driver=False,
            namespace=NAMESPACE,
            _temp_dir=folder,
            object_store_memory=100 << 20,
        )
        try:
            yield context.address_info["address"]
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ends_actors(ray_cluster: str) -> Iterator[None]:
    """Ends every named actor after the test; one may end by itself meanwhile."""
    yield
    import ray

    from workers.ray.actors import find_actor, kill

    for name in ray.util.list_named_actors():
        actor = find_actor(name, NAMESPACE)
        if actor is not None:
            kill(actor)


@pytest.fixture
def fake_service() -> Iterator[FakeService]:
    service = FakeService()
    service.up()
    yield service
    if service._server is not None:
        service.down()
