"""Ranks find each other at any address that a node may have."""

import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.parallel
ALONE = "ip link set lo up && ip addr del 127.0.0.1/8 dev lo && exec "
"""Leaves a network namespace no address but ::1."""


def run_at(
    *addresses: str, wrapper: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "tests.support.ranks_at_address", *addresses]
    if wrapper:
        program = [*wrapper, ALONE + " ".join(program)]
    return subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)


def test_ranks_meet_at_ipv6_and_at_a_second_address_of_an_interface() -> None:
    done = run_at("::1", "127.0.0.2")
    assert done.stdout == "::1 3.0\n127.0.0.2 3.0\n", done.stderr


def test_ranks_meet_on_a_node_without_ipv4() -> None:
    namespace = ("unshare", "--net", "--map-root-user", "sh", "-c")
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs unshare and ip for a network namespace without IPv4")
    done = run_at("::1", wrapper=namespace)
    if "unshare" in done.stderr:
        pytest.skip("this machine permits no network namespaces")
    assert done.stdout == "::1 3.0\n", done.stderr
