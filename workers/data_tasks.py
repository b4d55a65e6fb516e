"""Runs a driver's CPU work as Ray tasks: data, and files of ranks on their nodes.

Owns: the bodies, plain functions. Torch- and Ray-free. Must not know: the driver.

Each returns plain values, problems of the spec included, so nothing of the library needs
to be pickled.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ray.checkpoint.directory import latest_committed
from megatron_ray.checkpoint.disk_space import room_problems
from megatron_ray.checkpoint.initial_model import resolve_initial_model
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import Problem
from megatron_ray.data.preparation.errors import UnusableDataError
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.validation.check import find_problems
from megatron_ray.validation.resolution import with_length, with_vocabulary
from megatron_ray.validation.training import sample_problems
from workers.protocol.job import JobSpec
from workers.rank.spool import Line, SpoolReader

_RETRY_S = 0.3
_MAX_TRIES = 10
_ALL_LINES = 1_000_000


def prepare_data(
    spec: JobSpec, progress: Callable[[str], None] | None = None
) -> PreparedData:
    """Prepares the data of a spec, under its storage path or in data.cache.

    The storage path must be resolved; `progress` receives messages. Raises
    UnusableDataError, also if the tokens do not fit the model, the model does not fit the
    weights it starts from, the epochs have too many samples or the disk has no room left
    for the checkpoints, and StorageError.
    """
    cache = spec.data_cache
    if cache is None:
        raise ValueError("storage.path is not resolved")
    # The cheap check comes first, because tokenizing may take hours.
    model = _model_with_initial_vocabulary(spec)
    seq_length = spec.training.seq_length
    if progress is None:
        prepared = prepare(spec.data, cache, seq_length=seq_length)
    else:
        prepared = prepare(spec.data, cache, seq_length=seq_length, progress=progress)
    # Only now is the tokenizer's vocabulary known.
    try:
        resolved = with_vocabulary(
            spec.model_copy(update={"model": model}), prepared.vocab_size
        )
    except ValueError as error:
        problem = Problem("/model/vocab_size", "vocab_fits", str(error))
        raise UnusableDataError([problem]) from error
    # Nor was the number of steps of a number of epochs.
    if spec.training.epochs is not None:
        _check_epochs(spec, prepared.num_train_tokens)
    # And how much room the prepared data have left.
    if spec.storage is not None:
        problems = room_problems(resolved, spec.storage.path)
        if problems:
            raise UnusableDataError(problems)
    return prepared


def _check_epochs(spec: JobSpec, num_tokens: int) -> None:
    """Raises UnusableDataError for problems of the number of steps."""
    resolved = with_length(spec, num_tokens)
    problems = sample_problems(spec.training, resolved.training.num_steps)
    if not problems:
        problems = find_problems(resolved)
    if problems:
        raise UnusableDataError(problems)


def _model_with_initial_vocabulary(spec: JobSpec) -> ModelConfig:
    """Returns the model with the vocabulary of the weights it starts from.

    A job that has a checkpoint of its own no longer needs those weights. Raises
    UnusableDataError when they do not fit the model.
    """
    has_checkpoint = (
        spec.storage is not None
        and spec.checkpoint.start_from
        and latest_committed(spec.storage.path) is not None
    )
    if has_checkpoint:
        return spec.model
    model, problems = resolve_initial_model(
        spec.checkpoint, spec.model, compare_copies=True
    )
    if problems:
        raise UnusableDataError(problems)
    return model


def prepare_task(spec: dict[str, Any]) -> dict[str, Any]:
    """Prepares the data of a spec given as JSON.

    Returns `{"prepared": PreparedData}` or `{"problems": [...]}`; raises every other
    error.
    """
    try:
        prepared = prepare_data(JobSpec.from_mapping(spec))
    # A user's error is a result. Only errors that a retry may avoid are raised.
    except UnusableDataError as error:
        return {"problems": problem_rows(error.problems)}
    return {"prepared": prepared.model_dump(mode="json")}


def problem_rows(problems: list[Problem]) -> list[dict[str, str]]:
    """Returns problems as the fields of wire.ProblemMessage."""
    rows = []
    for problem in problems:
        rows.append(
            {"pointer": problem.pointer, "code": problem.code, "detail": problem.detail}
        )
    return rows


def read_dead_rank_files(
    report_file: str, after: int, log_file: str, log_offset: int, log_bytes: int
) -> tuple[list[Line], bytes]:
    """Returns a dead rank's reports after number `after`, and the end of its log.

    The log is read from `log_offset`, but at most its last `log_bytes` bytes.
    """
    # The reports come first, so that an unreadable log cannot lose them.
    lines = SpoolReader(Path(report_file)).read(after, limit=_ALL_LINES)
    try:
        with open(log_file, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(min(size, max(log_offset, size - log_bytes)))
            return lines, file.read(log_bytes)
    except OSError:
        return lines, b""


def delete_job_folder(folder: str) -> None:
    """Deletes a job's folder on a node until it is not recreated.

    A process that Ray reports as dead may still be exiting and writing files.
    """
    # Gives up after a few tries: Ray deletes the folder with its session.
    for _ in range(_MAX_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_RETRY_S)
        if not Path(folder).exists():
            break
