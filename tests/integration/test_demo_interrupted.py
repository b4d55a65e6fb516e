"""`megatron-ray demo` with everything real, interrupted at random moments: nothing
stays behind.
"""

import random
import signal
import sys
from pathlib import Path

import pytest

from service.local_stack.teardown import down
from tests.support.watched_stack import Watched

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

SEED = 20261120
DEMO = (
    sys.executable,
    "-m",
    "service.cli.entry",
    "demo",
    "--set",
    "training.steps=100",
    "--data-dir",
)


def moments(kind: str) -> list[float]:
    """Ten moments from the first import to well into training."""
    return sorted(random.Random(f"{SEED}-{kind}").uniform(0.0, 35.0) for _ in range(10))


@pytest.mark.parametrize("moment_s", moments("int"))
def test_sigint_to_the_group_at_any_moment(tmp_path: Path, moment_s: float) -> None:
    demo = Watched(tmp_path / "data", DEMO)
    demo.watch_for(moment_s)
    demo.signal(signal.SIGINT)
    demo.look()
    demo.process.wait(timeout=90)
    demo.assert_nothing_left()


@pytest.mark.parametrize("moment_s", moments("kill"))
def test_sigkill_then_down_at_any_moment(tmp_path: Path, moment_s: float) -> None:
    demo = Watched(tmp_path / "data", DEMO)
    demo.watch_for(moment_s)
    demo.signal(signal.SIGKILL)
    demo.process.wait()
    demo.look()
    down(demo.data_dir, lambda text: None, job_grace_s=0)
    demo.assert_nothing_left()
