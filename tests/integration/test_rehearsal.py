"""The pods of an overlay run as local processes and train a job. Everything that is started
is read from the rendered manifests.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.kubelet.sandbox import command_inside, why_not
from tests.support.manifests import ROOT

pytestmark = pytest.mark.ray
TIMEOUT_S = 1500


def rehearse(name: str, folder: Path) -> str:
    """Runs a rehearsal in namespaces, which end with it; returns its output."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    module = [sys.executable, "-m", "tests.support.rehearsal", name, str(folder)]
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
    return result.stdout


def test_a_job_is_trained_while_every_pod_dies_once(tmp_path: Path) -> None:
    assert "all probes have passed" in rehearse("deaths", tmp_path)


@pytest.mark.chaos
def test_a_job_is_trained_while_one_pod_after_the_other_dies(tmp_path: Path) -> None:
    assert "all probes have passed" in rehearse("one_by_one", tmp_path)


@pytest.mark.chaos
def test_a_worker_whose_pod_is_deleted_loses_no_step(tmp_path: Path) -> None:
    assert "the job has gone on" in rehearse("deletion", tmp_path)


@pytest.mark.chaos
def test_a_ray_job_ends_with_its_job(tmp_path: Path) -> None:
    assert "the entrypoint has ended" in rehearse("rayjob", tmp_path)
