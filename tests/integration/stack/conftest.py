"""The stack that all tests of this folder share; tests/conftest.py keeps them in one process."""

import pytest

from tests.support.running_stack import Road, WholeJob, road

__all__ = ["road"]


@pytest.fixture(scope="session")
def whole_job(road: Road) -> WholeJob:
    """A job of the usual spec that nothing disturbs."""
    job = road.finish(road.client.submit(road.spec())["id"])
    assert job["status"] == "succeeded", job
    return WholeJob(job, road.rows(job["id"]))
