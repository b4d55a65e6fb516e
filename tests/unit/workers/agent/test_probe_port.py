"""Ray's address as the agent gets it: host and port, IPv4 or IPv6."""

import socket

import pytest

from workers.agent.agent import probe_port


@pytest.mark.parametrize(
    ("host", "family"),
    [("127.0.0.2", socket.AF_INET), ("::1", socket.AF_INET6)],
)
def test_a_port_is_reached_at_any_address(host: str, family: int) -> None:
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        written = f"[{host}]"
        if family is socket.AF_INET:
            written = host
        probe_port(f"{written}:{port}")


@pytest.mark.parametrize("address", ["nonsense", "::1:6379", "[::1]", "host:port", ":6379"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"--address must be host:port, or \[host\]:port"):
        probe_port(address)
