"""Checks paths from inside the cluster, as Ray tasks.

Owns: the bodies, plain functions. Torch- and Ray-free; each returns plain values.
"""

import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from megatron_ray.checkpoint.claim import read_claim
from megatron_ray.checkpoint.directory import list_checkpoints
from megatron_ray.checkpoint.disk_space import room_problems
from megatron_ray.config.errors.spec_problems import problems_from_pydantic
from megatron_ray.config.problem import Problem
from megatron_ray.data.preparation.check import check_data
from megatron_ray.data.prepared_length import num_prepared_tokens
from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.storage import open_storage
from megatron_ray.validation.storage.path_rules import Links, PathRules, path_problems
from workers.data_tasks import (
    credentials_problem,
    left_out_notes,
    problem_rows,
    resolve_initial_weights,
)
from workers.driver.journal import Journal, JournalError, job_of_folder
from workers.protocol.job import JobSpec
from workers.protocol.wire import ResumedJob
from workers.rank.environment import CredentialsError, credentials

NONCE_FOLDER = ".megatron-ray"
_PREPARED_SUFFIXES = (".bin", ".idx")
"""A corpus of prepared data is named without them."""


def check_task(
    spec: dict[str, Any],
    storage_path: str,
    path_rules: dict[str, Any] | None = None,
    resumed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns problems of a spec's paths as seen from the cluster, and notes, as JSON.

    `path_rules` are PathRules: what they refuse is not opened. `resumed` is the
    ResumedJob whose spec it is, if any. Quick: nothing is tokenized.
    """
    # The service has validated the spec, but this code may have another version.
    try:
        job = JobSpec.from_mapping(spec)
    except ValidationError as error:
        problems = problems_from_pydantic(error.errors(), spec, model=JobSpec)
        return {"problems": problem_rows(problems), "notes": []}
    if path_rules is not None:
        # Links are followed here, because the service does not see the cluster's files.
        rules = PathRules.from_mapping(path_rules)
        problems = path_problems(job, rules, Links(os.path.realpath, link_targets))
        if problems:
            return {"problems": problem_rows(problems), "notes": []}
    try:
        with credentials(job.credentials):
            return _checked(job, storage_path, resumed)
    except CredentialsError as error:
        return {"problems": problem_rows([credentials_problem(error)]), "notes": []}


def _checked(
    job: JobSpec, storage_path: str, resumed: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns problems and notes of the paths of a spec, which may be opened."""
    if resumed is not None:
        problems = _resume_problems(job, storage_path, ResumedJob.model_validate(resumed))
        return {"problems": problem_rows(problems), "notes": []}
    model, weights, weights_problems = resolve_initial_weights(job)
    checked = check_data(
        job.data,
        job.training.seq_length,
        storage_path,
        weights=weights,
        rows=model.vocab_size,
    )
    problems = [*checked.problems, *weights_problems, *_folder_problems(storage_path)]
    # Only of a storage that can be written at all.
    if not problems:
        problems += room_problems(job, storage_path)
    notes = [*checked.notes, *_length_notes(job, storage_path)]
    if not weights_problems:
        notes += left_out_notes(job)
    return {"problems": problem_rows(problems), "notes": notes}


def _length_notes(job: JobSpec, storage_path: str) -> list[str]:
    """Returns the steps of a number of epochs when the data are prepared already."""
    epochs = job.training.epochs
    if epochs is None:
        return []
    cache = job.data.cache or f"{storage_path.rstrip('/')}/data"
    num_tokens = num_prepared_tokens(job.data, cache)
    if num_tokens is None:
        return []
    steps = job.training.steps_over(num_tokens)
    return [f"training.epochs={epochs:g} makes {steps:,} steps on the prepared data"]


def link_targets(place: str) -> Iterator[str]:
    """Yields the places that links at or below a place lead to, and then those below them.

    What cannot be listed has no links to follow, and cannot be read either.
    """
    for suffix in _PREPARED_SUFFIXES:
        if os.path.islink(place + suffix):
            yield os.path.realpath(place + suffix)
    folders = [place]
    visited = set()
    while folders:
        folder = folders.pop()
        if folder in visited:
            continue
        visited.add(folder)
        for path, is_link in _folders_and_links(folder):
            if is_link:
                path = os.path.realpath(path)
                yield path
            folders.append(path)


def _folders_and_links(folder: str) -> list[tuple[str, bool]]:
    entries = []
    try:
        with os.scandir(folder) as listed:
            for entry in listed:
                is_link = entry.is_symlink()
                if is_link or entry.is_dir():
                    entries.append((entry.path, is_link))
    except OSError:
        pass  # a file, or nothing
    return entries


def _folder_problems(storage_path: str) -> list[Problem]:
    """Returns a problem if a new job's folder holds another job, or another run.

    Otherwise the new job would resume from the other's checkpoints and overwrite its
    records.
    """
    try:
        job = job_of_folder(storage_path)
        claim = read_claim(storage_path)
        checkpoints = [
            info for info in list_checkpoints(storage_path) if info.was_committed
        ]
    # A journal that cannot be read still shows that the folder belongs to a job.
    except JournalError as error:
        return [_in_use(storage_path, f"another job ({error})")]
    except StorageError:
        return []  # reported by the check for writing
    if job is not None:
        problem = _in_use(storage_path, f"another job ({job.job_id})")
        remedy = f", or continue that job with `megatron-ray resume {job.job_id}`"
        return [replace(problem, detail=problem.detail + remedy)]
    if checkpoints:
        last = checkpoints[-1].step
        run = f"committed checkpoints of a run without a service, up to step {last}"
        return [_in_use(storage_path, run)]
    if claim is not None and claim.may_be_running:
        run = f"a run without a service, process {claim.pid} on {claim.host}"
        return [_in_use(storage_path, run)]
    return []


def _resume_problems(
    spec: JobSpec, storage_path: str, resumed: ResumedJob
) -> list[Problem]:
    """Returns why a job cannot go on with what its folder holds."""
    problems = []
    # Other data are checked as those of a new job; unchanged ones are prepared already.
    if resumed.has_other_data:
        length = spec.training.seq_length
        problems += check_data(spec.data, length, storage_path).problems
    if not resumed.had_driver:
        return problems
    try:
        entry = Journal(open_storage(storage_path)).latest()
        claim = read_claim(storage_path)
        checkpoints = [
            info for info in list_checkpoints(storage_path) if info.was_committed
        ]
    except (JournalError, StorageError) as error:
        return [*problems, Problem("/storage/path", "lost", str(error))]
    remedy = (
        "restore the folder and resume the job again, or submit the spec as a new job to begin "
        "at step 0"
    )
    if entry is None or entry.job_id != resumed.job_id:
        detail = f"{storage_path} no longer holds the files of this job; {remedy}"
        problems.append(Problem("/storage/path", "lost", detail))
    elif entry.last_commit > 0 and not checkpoints:
        detail = (
            f"the checkpoint of step {entry.last_commit} was committed, and none is in "
            f"{storage_path} any more; {remedy}"
        )
        problems.append(Problem("/storage/path", "lost", detail))
    elif claim is not None and claim.may_be_running:
        detail = (
            f"{storage_path} is in use by a run without a service, process {claim.pid} on "
            f"{claim.host}; stop it first"
        )
        problems.append(Problem("/storage/path", "in_use", detail))
    return problems


def _in_use(storage_path: str, owner: str) -> Problem:
    message = (
        f"{storage_path} already holds {owner}; give this job a folder of its own, or leave "
        "storage.path out"
    )
    return Problem("/storage/path", "in_use", message)


def write_nonce(root: str) -> tuple[str, str]:
    """Writes a random string below the storage root; returns (file name, string).

    Raises StorageError.
    """
    name = f"{NONCE_FOLDER}/nonce-{secrets.token_hex(4)}"
    nonce = secrets.token_hex(16)
    open_storage(root).write_bytes_atomic(name, nonce.encode())
    return name, nonce


def nonce_matches(root: str, name: str, nonce: str) -> bool:
    """Returns whether this node reads the nonce that the agent wrote.

    If it does, node and agent see the same storage.
    """
    try:
        return open_storage(root).read_bytes(name).decode() == nonce
    except (StorageError, UnicodeDecodeError):
        return False
