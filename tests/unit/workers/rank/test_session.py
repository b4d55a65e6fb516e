"""The timeout of collectives: longer until the first step is done."""

from datetime import timedelta
from typing import Any

import pytest

from megatron_ray.commands import Command
from workers.protocol.network import NetworkConfig
from workers.rank.session import _with_timeout_after_start


class FakeMesh:
    """Keeps the timeouts that it is given."""

    def __init__(self) -> None:
        self.timeouts: list[timedelta] = []

    def set_timeout(self, timeout: timedelta) -> None:
        self.timeouts.append(timeout)


def no_command() -> Command:
    return Command.CONTINUE


@pytest.mark.parametrize(
    ("network", "start_s", "later_s"),
    [
        (NetworkConfig(), 600.0, None),
        (NetworkConfig(collective_timeout_s=30), 600.0, 30.0),
        (NetworkConfig(collective_timeout_s=900, first_step_timeout_s=60), 900.0, None),
    ],
)
def test_the_timeout_is_shortened_in_the_second_step(
    network: NetworkConfig, start_s: float, later_s: float | None
) -> None:
    assert network.start_timeout_s == start_s
    mesh: Any = FakeMesh()
    poll = _with_timeout_after_start(mesh, network, no_command)
    assert poll() is Command.CONTINUE
    assert mesh.timeouts == []
    for _ in range(3):
        poll()
    expected = []
    if later_s is not None:
        expected = [timedelta(seconds=later_s)]
    assert mesh.timeouts == expected
