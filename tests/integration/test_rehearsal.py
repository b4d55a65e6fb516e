"""The pods of the overlay `dev` run as local processes, train a job, and die one after the
other. Everything that is started is read from the rendered manifests.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.kubelet.sandbox import command_inside, why_not
from tests.support.manifests import ROOT

pytestmark = pytest.mark.ray
TIMEOUT_S = 900


def test_a_job_is_trained_while_every_pod_dies_once(tmp_path: Path) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    module = [sys.executable, "-m", "tests.support.rehearsal", "dev", str(tmp_path)]
    result = subprocess.run(
        command_inside(module),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    sys.stdout.write(result.stdout)
    assert result.returncode == 0, result.stdout
    assert "all probes have passed" in result.stdout
