"""The command that tokenizes data ahead of a job, as its preparing state would."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from megatron_ray.config.training import TrainingConfig
from megatron_ray.data.prepared import PreparedCorpus
from megatron_ray.validation.storage.path_rules import path_problems
from service.cli.failure import CommandError
from service.cli.output import AsJson, console, print_json
from service.cli.spec_file import Overrides, SpecFile, read_spec
from service.cli.spec_parsing import parse_spec, problems_failure
from workers.protocol.wording import counted

data_app = typer.Typer(
    name="data", help="Tokenize and index corpora ahead of a job.", no_args_is_help=True
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
            help="Folder for .bin and .idx files, shared by jobs whose data.cache names it. "
            "Default: the spec's data.cache."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize a spec's corpora into .bin and .idx files.

    Jobs with the same data and cache use these files.
    """
    # Checked here, because no service takes part.
    job = parse_spec(read_spec(spec, overrides))
    wrong_paths = path_problems(job)
    if wrong_paths:
        raise problems_failure("the job spec is invalid", wrong_paths)
    folder = job.data.cache
    if cache is not None:
        folder = str(cache.expanduser().absolute())
    if folder is None:
        raise CommandError(
            "no folder to write to", remedy="set --cache or data.cache", exit_code=2
        )
    # Imported here: pyarrow and tokenizers take most of a second, which no other
    # command needs.
    from megatron_ray.data.preparation.errors import UnusableDataError
    from workers.data_tasks import prepare_data

    job = job.model_copy(update={"data": job.data.model_copy(update={"cache": folder})})
    out = console()

    def print_progress(message: str) -> None:
        if not as_json:
            out.print(f"[dim]{escape(message)}[/dim]")

    try:
        prepared = prepare_data(job, print_progress)
    except UnusableDataError as error:
        raise problems_failure("the data cannot be used", error.problems) from error
    if as_json:
        print_json(prepared.model_dump(mode="json"))
        return
    out.print(
        f"data ready in {escape(folder)}: {_amount('training', prepared.train)}, "
        f"{_amount('validation', prepared.validation)}, vocabulary {prepared.vocab_size:,}"
    )
    if job.training.steps is None:
        out.print(_length(job.training, prepared.num_train_tokens))
    if prepared.first_document:
        out.print(escape(prepared.first_document))


def _amount(split: str, corpora: Sequence[PreparedCorpus]) -> str:
    num_documents = sum(corpus.num_documents for corpus in corpora)
    num_tokens = sum(corpus.num_tokens for corpus in corpora)
    return f"{num_tokens:,} {split} tokens in {counted(num_documents, 'document')}"


def _length(training: TrainingConfig, num_train_tokens: int) -> str:
    """Returns the steps of a job whose length is given in epochs or tokens."""
    given = f"training.tokens={training.tokens}"
    if training.epochs is not None:
        given = f"training.epochs={training.epochs:g}"
    return (
        f"{given} makes {training.steps_over(num_train_tokens):,} steps of "
        f"{training.batch_sizes} x {training.seq_length} tokens"
    )
