"""Runs a driver's CPU work as Ray tasks: data, and files of ranks on their nodes.

Owns: the bodies, plain functions. Torch- and Ray-free. Must not know: the driver.

Each returns plain values, problems of the spec included, so nothing of the library needs
to be pickled.
"""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ray.checkpoint.directory import (
    CheckpointError,
    DamagedCheckpointError,
    list_checkpoints,
)
from megatron_ray.checkpoint.disk_space import room_problems
from megatron_ray.checkpoint.initial_model import (
    resolve_initial_model,
    weights_left_out,
)
from megatron_ray.checkpoint.initial_tokenizer import initial_tokenizer
from megatron_ray.checkpoint.resume_config import compare_with_checkpoint
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.model_tokenizer import ModelTokenizer
from megatron_ray.config.problem import Problem
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.errors import UnusableDataError
from megatron_ray.data.preparation.prepare import no_progress, prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.storage.errors import (
    AccessDeniedError,
    InvalidLocationError,
    MissingFileError,
)
from megatron_ray.validation.check import find_problems, find_warnings
from megatron_ray.validation.resolution import with_length, with_vocabulary
from megatron_ray.validation.training import sample_problems
from workers.decisions.failures import FailureKind, classify
from workers.protocol.job import JobSpec
from workers.rank.environment import CredentialsError, credentials
from workers.rank.spool import Line, SpoolReader

_PERMANENT = (CheckpointError, MissingFileError, AccessDeniedError, InvalidLocationError)
_RETRY_S = 0.3
_MAX_TRIES = 10
_KERNEL_LOG_S = 600.0
_KERNEL_RECORD_BYTES = 8192


def prepare_data(
    spec: JobSpec,
    progress: Callable[[str], None] = no_progress,
    resume_from: str | None = None,
) -> PreparedData:
    """Prepares the data of a spec, under its storage path or in data.cache.

    The storage path must be resolved; `progress` receives messages. `resume_from` is the
    job's checkpoint to resume from, if that is known; otherwise its newest counts. Raises
    UnusableDataError, also if tokenizer or model do not fit the weights that the job
    begins with, its data have changed since its checkpoint, the epochs have too many
    samples or the disk has no room left for the checkpoints, and StorageError.
    """
    cache = spec.data_cache
    if cache is None:
        raise ValueError("storage.path is not resolved")
    # The cheap checks come first, because tokenizing may take hours.
    model, weights, notes = _resolve_weights(spec, resume_from)
    prepared = prepare(
        spec.data,
        cache,
        seq_length=spec.training.seq_length,
        progress=progress,
        weights=weights,
        rows=model.vocab_size,
    )
    # The vocabulary of a tokenizer that was trained is known only now.
    try:
        with_weights = spec.model_copy(update={"model": model})
        resolved = with_vocabulary(with_weights, prepared.vocab_size, prepared.rows)
    except ValueError as error:
        problem = Problem("/model/vocab_size", "vocab_fits", str(error))
        raise UnusableDataError([problem]) from error
    if weights is not None and weights.is_of_run:
        notes += _changes_of_text(spec, weights.source, prepared)
    # Nor was the number of steps of a number of epochs.
    if spec.training.epochs is not None:
        notes += _check_epochs(spec, prepared.num_train_tokens)
    notes += _batch_notes(spec, prepared.num_train_tokens)
    # And how much room the prepared data have left.
    if spec.storage is not None:
        problems = room_problems(resolved, spec.storage.path)
        if problems:
            raise UnusableDataError(problems)
    for note in notes:
        progress(note)
    return prepared.model_copy(update={"notes": (*notes, *prepared.notes)})


def _changes_of_text(
    spec: TrainConfig, checkpoint: str, prepared: PreparedData
) -> list[str]:
    """Returns how the data differ from those that the run was saved with.

    Raises UnusableDataError for differences that the spec does not allow.
    """
    # The steps of a number of epochs are known only now.
    spec = with_length(spec, prepared.num_train_tokens)
    of_fields = compare_with_checkpoint(checkpoint, spec)
    comparison = compare_with_checkpoint(checkpoint, spec, prepared.train_sizes)
    if comparison.problems:
        raise UnusableDataError(list(comparison.problems))
    # Users have made the changes of fields themselves.
    return list(comparison.accepted[len(of_fields.accepted) :])


def _batch_notes(spec: JobSpec, num_tokens: int) -> list[str]:
    """Returns a note when a step has more samples than the training data."""
    training = spec.training
    # A sample has one extra token, the label of the last input.
    num_samples = max(1, (num_tokens - 1) // training.seq_length)
    if training.global_batch_size <= num_samples:
        return []
    return [
        f"/training/global_batch_size: each step has {training.global_batch_size} samples, and "
        f"the training data make {num_samples} of {training.seq_length} tokens: every step "
        "repeats them; lower it, or use more data"
    ]


def _check_epochs(spec: JobSpec, num_tokens: int) -> list[str]:
    """Returns what has no effect for the number of steps.

    Raises UnusableDataError for its problems.
    """
    resolved = with_length(spec, num_tokens)
    problems = sample_problems(spec.training, resolved.training.num_steps)
    if not problems:
        problems = find_problems(resolved)
    if problems:
        raise UnusableDataError(problems)
    # Those that do not depend on the steps were shown before.
    earlier = find_warnings(spec)
    notes = []
    for warning in find_warnings(resolved):
        if warning not in earlier:
            notes.append(f"{warning.pointer}: {warning.detail}")
    return notes


def _resolve_weights(
    spec: JobSpec, resume_from: str | None
) -> tuple[ModelConfig, ModelTokenizer | None, list[str]]:
    """Returns the job's model with its vocabulary, and the tokenizer of its weights.

    Also notes about weights that the job leaves out. Raises UnusableDataError.
    """
    own = None
    if resume_from is not None:
        own = initial_tokenizer(resume_from)
    elif spec.storage is not None:
        own = _newest_tokenizer(spec.storage.path)
    # A job that has a checkpoint of its own no longer needs the weights it started from.
    if own is not None:
        return spec.model, replace(own, is_of_run=True), []
    model, weights, problems = resolve_initial_weights(spec, compare_copies=True)
    if problems:
        raise UnusableDataError(problems)
    return model, weights, left_out_notes(spec)


def _newest_tokenizer(storage_path: str) -> ModelTokenizer | None:
    """Returns the tokenizer of a job's newest checkpoint that can be read; None without."""
    for info in reversed(list_checkpoints(storage_path)):
        if info.committed:
            # Bytes may be damaged that a listing does not show; all have the same one.
            with suppress(DamagedCheckpointError):
                return initial_tokenizer(info.path)
    return None


def left_out_notes(spec: JobSpec) -> list[str]:
    """Returns notes about initial weights that a job leaves out; they must be readable."""
    return weights_left_out(spec.checkpoint, spec.model)


def resolve_initial_weights(
    spec: JobSpec, *, compare_copies: bool = False
) -> tuple[ModelConfig, ModelTokenizer | None, list[Problem]]:
    """Returns a new job's model with its vocabulary, and the tokenizer of its weights.

    Also a problem for each field of the model that contradicts checkpoint.start_from.
    Without it, or when it cannot be read, there is no such tokenizer. `compare_copies`
    is that of resolve_initial_model.
    """
    model, problems = resolve_initial_model(
        spec.checkpoint, spec.model, compare_copies=compare_copies
    )
    start_from = spec.checkpoint.start_from
    if start_from is None or any(problem.code == "start_from" for problem in problems):
        return model, None, problems
    try:
        return model, initial_tokenizer(start_from), problems
    except CheckpointError as error:
        problem = Problem("/checkpoint/start_from", "start_from", str(error))
        return model, None, [*problems, problem]


def prepare_task(spec: dict[str, Any]) -> dict[str, Any]:
    """Prepares the data of a spec given as JSON.

    Returns `{"prepared": PreparedData}`, `{"problems": [...]}` or, where the storage
    fails and another try may succeed, `{"storage": message}`; raises every other error.
    """
    job = JobSpec.from_mapping(spec)
    try:
        with credentials(job.credentials):
            prepared = prepare_data(job)
    # A user's error is a result. Only errors that a retry may avoid are raised.
    except UnusableDataError as error:
        return {"problems": problem_rows(error.problems)}
    except CredentialsError as error:
        return {"problems": problem_rows([credentials_problem(error)])}
    except OSError as error:
        if not _is_outage(error):
            raise
        return {"storage": str(error)}
    return {"prepared": prepared.model_dump(mode="json")}


def _is_outage(error: OSError) -> bool:
    """Whether another try may succeed: not for a path that is wrong."""
    if isinstance(error, _PERMANENT):
        return False
    own_kind = getattr(error, "failure_kind", None)
    kind = classify(type(error).__name__, str(error), own_kind)
    return kind in (FailureKind.STORAGE, FailureKind.DISK_FULL)


def credentials_problem(error: CredentialsError) -> Problem:
    """Returns what is wrong with a spec's credentials on a node."""
    pointer, _, detail = str(error).partition(": ")
    return Problem(pointer, "credentials", detail)


def problem_rows(problems: list[Problem]) -> list[dict[str, str]]:
    """Returns problems as the fields of wire.ProblemMessage."""
    rows = []
    for problem in problems:
        rows.append(
            {"pointer": problem.pointer, "code": problem.code, "detail": problem.detail}
        )
    return rows


@dataclass(frozen=True)
class DeadRankEvidence:
    """What a dead rank has left on its node."""

    reports: list[Line]
    log: bytes
    """End of its log."""
    kernel_lines: list[str]
    """Lines of the kernel's log about GPUs, where it can be read."""


def read_dead_rank_files(
    report_file: str, after: int, log_file: str, log_offset: int, log_bytes: int
) -> DeadRankEvidence:
    """Returns a dead rank's reports after number `after`, and the end of its log.

    The log is read from `log_offset`, but at most its last `log_bytes` bytes.
    """
    # The reports come first, so that an unreadable log cannot lose them.
    reader = SpoolReader(Path(report_file))
    lines = list[Line]()
    while page := reader.read(after):
        lines += page
        after = page[-1].n
    log = b""
    with suppress(OSError), open(log_file, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(min(size, max(log_offset, size - log_bytes)))
        log = file.read(log_bytes)
    return DeadRankEvidence(lines, log, read_kernel_log())


def read_kernel_log(path: str = "/dev/kmsg") -> list[str]:
    """Returns the lines of the last minutes in which the driver of GPUs reports an error.

    None where the log cannot be read, which is usual in containers.
    """
    lines: list[str] = []
    oldest_us = (time.monotonic() - _KERNEL_LOG_S) * 1e6
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            # Each read returns one record, `priority,number,microseconds,flags;text`, and
            # fails once there are no more.
            while record := os.read(handle, _KERNEL_RECORD_BYTES):
                header, _, text = record.decode(errors="replace").partition(";")
                fields = header.split(",")
                is_recent = len(fields) > 2 and float(fields[2]) > oldest_us
                if is_recent and "NVRM: Xid" in text:
                    lines.append(text.splitlines()[0])
        finally:
            os.close(handle)
    return lines


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
