"""Runs the command line; the only module that is imported before Ctrl-C is safe.

Must not know: any command.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Lets SIGINT end the process at once while modules are imported.

    A process that ignores SIGINT, such as a background job, keeps ignoring it.
    """
    # Python's default handler raises KeyboardInterrupt, which can be lost when it is
    # raised in the clean-up of an import. Nothing has been started yet that would need
    # an orderly end, so the kernel's default is safe here.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def main() -> None:
    """Runs the command `megatron-ray`."""
    with importing():
        from service.cli.main import main as run
    run()


if __name__ == "__main__":
    main()
