"""What the agent's command line refuses before anything starts."""

import pytest
from typer.testing import CliRunner, Result

from workers.agent.__main__ import app


def run_agent(*options: str) -> Result:
    return CliRunner().invoke(app, options)


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://[bad"])
def test_a_malformed_url_is_refused(url: str) -> None:
    result = run_agent("--service", url, "--address", "127.0.0.1:1")
    assert result.exit_code == 2
    assert "--service" in result.stderr
    assert "http://host:port" in result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ("--service-url=http://127.0.0.1:1", "--address"),
        ("--ray-address=127.0.0.1:1", "--service"),
    ],
)
def test_service_and_address_are_both_needed(given: str, missing: str) -> None:
    result = run_agent(given)
    assert result.exit_code == 2
    assert missing in result.stderr
    assert isinstance(result.exception, SystemExit)
