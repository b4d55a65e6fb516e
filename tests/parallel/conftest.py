"""How long the runs are that layouts are compared by."""

import pytest


@pytest.fixture(scope="session")
def steps(request: pytest.FixtureRequest) -> int:
    """Steps of a run that is compared with one rank's: few here, more in `make parity`."""
    return int(request.config.getoption("--steps"))
