"""Fixtures that every part's tests may use."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

from tests.ranks import run_ranks as _run_ranks

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
    gloo ranks, see tests/ranks.py.
    """
    return _run_ranks
