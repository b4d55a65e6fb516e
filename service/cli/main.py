"""The command line.

Owns: the list of commands and the way out: exit code 0 only when the asked-for thing
happened.

Must not know: what a command does.
"""

import sys

import typer

from service.cli.commands import convert, data, demo, generate, inspect, jobs, plan, stack
from service.cli.failure import CommandError, from_service, show_failure
from service.client import ServiceError

app = typer.Typer(
    name="megatron-ray",
    help="Train GPT-class models on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for commands in (stack, plan, jobs, inspect, generate, convert, data, demo):
    commands.register(app)


def main() -> None:
    """Entry point.

    A mistake of the user's ends in one message, never in a traceback.
    """
    try:
        app()
    except CommandError as failure:
        show_failure(failure, as_json="--json" in sys.argv)
        raise SystemExit(failure.exit_code) from failure
    except ServiceError as error:
        show_failure(from_service(error), as_json="--json" in sys.argv)
        raise SystemExit(1) from error
    except BrokenPipeError:
        sys.stderr.close()  # `megatron-ray jobs | head`: nobody listens any more
        raise SystemExit(1) from None
