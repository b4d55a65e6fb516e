"""Defines the command line and its exit codes.

The exit code is 0 only if the command succeeded. Must not know: the work of commands.
"""

import sys
from typing import Annotated

import typer

from service.cli.commands import (
    cancel,
    data,
    demo,
    inspect,
    jobs,
    pausing,
    plan,
    stack,
)
from service.cli.commands.models import convert, generate, mup, verify
from service.cli.commands.ranks import diagnose, profile
from service.cli.failure import CommandError, from_service, show_failure
from service.client import ServiceError
from workers.protocol.version import code_version

app = typer.Typer(
    name="megatron-ray",
    help="Train GPT-class models on a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# The order in which `--help` lists them.
for commands in (
    stack,
    plan,
    jobs,
    cancel,
    pausing,
    inspect,
    diagnose,
    profile,
    generate,
    convert,
    verify,
    mup,
    data,
    demo,
):
    commands.register(app)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"megatron-ray {code_version()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Declares the options that go before a command; typer acts on them."""


def main() -> None:
    """Runs the command line; a user's error prints one message, not a traceback."""
    # Errors may occur before the options are parsed, hence argv.
    try:
        app()
    except CommandError as failure:
        show_failure(failure, as_json="--json" in sys.argv)
        raise SystemExit(failure.exit_code) from failure
    except ServiceError as error:
        show_failure(from_service(error), as_json="--json" in sys.argv)
        raise SystemExit(1) from error
    except BrokenPipeError:
        # As in `megatron-ray jobs | head`. Closed, so that the interpreter does not
        # report the same error again when it exits.
        sys.stderr.close()
        raise SystemExit(1) from None
