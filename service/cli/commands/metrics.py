"""The command that lists a job's metrics by step, and what of them is missing.

Must not know: how a job is created or changed.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from service.cli.choice import JobId
from service.cli.commands.show import absence
from service.cli.connection import DataDir, Token, Url, connect
from service.cli.numbers import at_least
from service.cli.output import AsJson, Column, nested, number, print_note, print_page

_METRICS = "loss,grad_norm,lr,tokens_per_s"
_MOST_IN_A_LINE = 6
"""Parts of a metric; more of them stand in a line each."""


def metrics(
    job_id: JobId,
    keys: Annotated[
        str,
        typer.Option(
            help="Comma-separated names, such as val_loss/SOURCE, or monitors/NAME of a "
            "callback; monitors are all of these."
        ),
    ] = _METRICS,
    from_step: Annotated[
        int | None,
        typer.Option(parser=at_least(0), help="First step. Default: the job's first."),
    ] = None,
    max_points: Annotated[
        int | None,
        typer.Option(
            parser=at_least(2),
            help="Thin out to at most this many rows. Default: no thinning.",
        ),
    ] = None,
    attempt: Annotated[
        int | None,
        typer.Option(
            parser=at_least(1),
            help="Only this attempt. Default: the newest that ran each step.",
        ),
    ] = None,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List a job's metrics by step."""
    with connect(url, token, data_dir) as client:
        page = client.metrics(
            job_id, keys=keys, from_step=from_step, max_points=max_points, attempt=attempt
        )
        empty = ""
        if not page["data"]:
            empty = _no_metrics(client.show(job_id), keys, from_step, attempt)
    # A step may have been run by several attempts, so each row names its own.
    columns: dict[str, Column] = {
        "step": lambda row: str(row["step"]),
        "attempt": lambda row: str(row.get("attempt")),
    }
    for key in keys.split(","):
        name = key.strip()
        if name:
            columns[name] = _metric_column(name)
    print_page(page, as_json, columns, empty=empty)
    if not as_json:
        _print_empty_columns(page, columns)
        _print_missing_steps(page)


def _print_empty_columns(page: Mapping[str, Any], columns: Iterable[str]) -> None:
    """Prints which parts of metrics, such as misspelt sources, no step has."""
    for name in columns:
        metric, is_part, _ = name.partition("/")
        if not is_part or any(row.get(name) is not None for row in page["data"]):
            continue
        hint = f"--keys {metric} shows the parts"
        if metric == "val_loss":
            hint = "megatron-ray show JOB names the sources"
        if page["data"]:
            print_note(f"no step has {name}; {hint}")


def _print_missing_steps(page: Mapping[str, Any]) -> None:
    """Prints which steps are missing from a page of metrics, if any."""
    num_rows = len(page["data"])
    if page.get("has_more"):
        next_step = page["data"][-1]["step"] + 1
        print_note(f"more steps follow; show them with --from-step {next_step}")
    elif (page.get("total") or 0) > num_rows:
        print_note(f"{num_rows} of {page['total']} steps; show all without --max-points")


def _no_metrics(
    job: Mapping[str, Any], keys: str, from_step: int | None, attempt: int | None
) -> str:
    """Returns why there is no row to print."""
    last_step = nested(job, "progress.step")
    if last_step is None:
        return absence(job, "no metrics")
    if from_step is not None and from_step > last_step:
        return f"no metrics from step {from_step} on; the last step is {last_step}"
    if attempt is not None:
        return f"no metrics of attempt {attempt}; the last step is {last_step}"
    hint = ""
    if "monitors/" in keys:
        hint = "; --keys monitors shows all numbers that there are"
    return f"no step up to {last_step} has {keys}{hint}"


def _metric_column(name: str) -> Column:
    # A function, so that each column keeps its own name: a lambda in the loop would
    # read the last one.
    return lambda row: _metric(row.get(name))


def _metric(value: Any) -> str:
    # Some metrics have parts: the split of a step's time, the other losses.
    if isinstance(value, dict):
        separator = ", "
        if len(value) > _MOST_IN_A_LINE:
            separator = "\n"
        parts = [f"{name} {_metric(part)}" for name, part in value.items()]
        return separator.join(parts) or "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return number(value)
