"""Fixtures that every part's tests may use."""

import os

# Tests run several processes at once; more threads than cores only wait for each other.
# It must be set before torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

SHARED_STACK = "tests/integration/stack/"
FIRST = (
    "tests/integration/test_rehearsal.py",
    # Each is one process, most of the time: three nodes of Ray start beside them.
    "tests/unit/workers/",
    "tests/unit/service/",
    SHARED_STACK,
)
"""What takes long, so that no process is left with it at the end; the rest comes as it
lies in the folders, and ends with short files."""
MEMORY_FILES = Path("/dev/shm")
MIN_FREE_BYTES = 8 << 30
"""A whole run writes some hundred MB; Ray's object stores are in memory files too."""

# A machine busy with something else makes an example slow, not wrong.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


def pytest_configure(config: pytest.Config) -> None:
    """Puts `tmp_path` in memory where there is room: creating files on a disk takes longer
    than many tests. A folder named on the command line or in the environment goes first.
    """
    if MEMORY_FILES.is_dir() and shutil.disk_usage(MEMORY_FILES).free > MIN_FREE_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_FILES))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--steps",
        type=int,
        default=6,
        help="steps of the runs by which layouts are compared with one rank, at least 6",
    )
    parser.addoption(
        "--postgres",
        metavar="URL",
        help="run the service's tests on databases made on this server, postgresql+psycopg://user@host:port/postgres",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: place_in_order(item.nodeid))


def place_in_order(nodeid: str) -> int:
    """Returns the place of a test's file in FIRST, or the place behind it."""
    for place, path in enumerate(FIRST):
        if nodeid.startswith(path):
            return place
    return len(FIRST)


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks(fn, world_size, *args, timeout_s=60)`: a module-level function on real
    gloo ranks, see tests/support/ranks.py.
    """
    # Here, since tests of the service alone need not import torch.
    from tests.support.ranks import run_ranks

    return run_ranks


class FileScheduling(LoadScopeScheduling):
    """Sends all tests of a file to one process, where they share its fixtures.

    The tests of SHARED_STACK are one file in this respect: they share a running stack.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return SHARED_STACK if path.startswith(SHARED_STACK) else path


@pytest.hookimpl(optionalhook=True)  # there is none when xdist is switched off
def pytest_xdist_make_scheduler(
    config: pytest.Config, log: Producer
) -> LoadScopeScheduling | None:
    if config.getvalue("dist") != "loadscope":
        return None
    return FileScheduling(config, log)
