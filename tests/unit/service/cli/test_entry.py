"""Ctrl-C while the command line is being imported."""

import signal
import subprocess
import sys
import time

import pytest

from service.cli.entry import importing

# An import whose clean-up swallows a KeyboardInterrupt, as those of real libraries
# sometimes do.
SWALLOWING = """
import sys, time
from service.cli.entry import importing
with importing():
    print("importing", flush=True)
    try:
        time.sleep(20)
    except BaseException:
        pass
    print("went on", flush=True)
    time.sleep(20)
"""


def test_an_interruption_is_not_lost_in_an_import() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SWALLOWING], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT
        assert time.monotonic() - started < 5
        assert process.stdout.read() == ""


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_the_handler_is_restored_afterwards(handler: signal.Handlers) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with importing():
            assert signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.SIG_IGN)
        assert (
            signal.getsignal(signal.SIGINT) is handler
            or signal.getsignal(signal.SIGINT) == handler
        )
    finally:
        signal.signal(signal.SIGINT, before)
