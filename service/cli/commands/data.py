"""Commands for data: `data prepare` does ahead of time what a job's preparing state
does.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.markup import escape

from service.cli.failure import CommandError
from service.cli.output import AsJson, console, print_json
from service.cli.spec_file import Overrides, SpecFile, read_spec
from workers.protocol.job import JobSpec

data_app = typer.Typer(
    name="data", help="Corpora: tokenize and index ahead of a job.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    app.add_typer(data_app)


@data_app.command("prepare")
def prepare(
    spec: SpecFile,
    overrides: Overrides = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for .bin/.idx, shared by jobs that set data.cache to it; the spec's "
            "data.cache when not given."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize a spec's corpora into .bin/.idx.

    A job with the same data and cache finds them done.
    """
    job = validated(read_spec(spec, overrides))
    folder = str(cache.expanduser().absolute()) if cache is not None else job.data.cache
    if folder is None:
        raise CommandError(
            "no folder to write to",
            remedy="name one with --cache, or --set data.cache=...",
            exit_code=2,
        )
    # Imported here because pyarrow and tokenizers take most of a second that no other
    # command needs.
    from megatron_ray.data.preparation.errors import UnusableDataError
    from megatron_ray.data.preparation.prepare import prepare as prepare_corpora

    out = console()
    try:
        prepared = prepare_corpora(
            job.data,
            folder,
            seq_length=job.training.seq_length,
            progress=(lambda text: None)
            if as_json
            else (lambda text: out.print(f"[dim]{escape(text)}[/dim]")),
        )
    except UnusableDataError as error:
        raise problems_failure(
            "the data cannot be used",
            [(problem.pointer, problem.detail) for problem in error.problems],
        ) from error
    manifest = prepared.model_dump(mode="json")
    if as_json:
        print_json(manifest)
    else:
        tokens = sum(corpus.num_tokens for corpus in prepared.train)
        out.print(
            f"prepared in {escape(folder)}: {tokens:,} training tokens, vocabulary of "
            f"{prepared.vocab_size:,}"
        )


def validated(values: dict[str, Any]) -> JobSpec:
    """The spec as the library reads it.

    Raises Failure with one line per wrong field.
    """
    try:
        return JobSpec.model_validate(values)
    except ValidationError as error:
        found = [
            ("/" + "/".join(str(part) for part in item["loc"]), item["msg"])
            for item in error.errors()
        ]
        raise problems_failure("the job spec is wrong", found) from error


def problems_failure(title: str, found: list[tuple[str, str]]) -> CommandError:
    """A failure with a line per field."""
    body = {
        "title": title,
        "detail": title,
        "errors": [{"pointer": pointer, "detail": detail} for pointer, detail in found],
    }
    return CommandError(
        "\n".join([title, *(f"  {pointer}: {detail}" for pointer, detail in found)]),
        exit_code=2,
        body=body,
    )
