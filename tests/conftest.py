"""Fixtures that every part's tests may use."""

import os

# Tests run several processes at once; more threads than cores only wait for each other.
# It must be set before torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

from tests.support.ranks import run_ranks as _run_ranks

# A machine busy with something else makes an example slow, not wrong.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres",
        metavar="URL",
        help="run the service's tests on databases made on this server, postgresql+psycopg://user@host:port/postgres",
    )


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks(fn, world_size, *args, timeout_s=60)`: a module-level function on real
    gloo ranks, see tests/support/ranks.py.
    """
    return _run_ranks


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives every test its group for xdist, whose tests share a process.

    A module's tests share its fixtures; all tests of the running stack share that stack.
    """
    for item in items:
        names = getattr(item, "fixturenames", ())
        group = "stack" if "road" in names else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
