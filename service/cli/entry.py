"""What runs first.

Owns: that Ctrl-C works while the command line is being imported. Must not know: any
command.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """SIGINT ends the process at once.

    A KeyboardInterrupt could be lost in the middle of an import, whose clean-up
    swallows what is raised there, and nothing has been started yet that would need an
    orderly end. Who ignores SIGINT (a background job) goes on doing so.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def main() -> None:
    """The command `megatron-ray`."""
    with importing():
        from service.cli.main import main as run
    run()


if __name__ == "__main__":
    main()
