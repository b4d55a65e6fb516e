"""Checks paths from inside the cluster, as Ray tasks.

Owns: the bodies, plain functions. Torch- and Ray-free; each returns plain values.
"""

import secrets
from typing import Any

from pydantic import ValidationError

from megatron_ray.checkpoint.directory import list_checkpoints
from megatron_ray.checkpoint.disk_space import room_problems
from megatron_ray.checkpoint.initial_model import resolve_initial_model
from megatron_ray.config.errors.spec_problems import problems_from_pydantic
from megatron_ray.config.problem import Problem
from megatron_ray.data.preparation.check import check_data
from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.storage import open_storage
from workers.data_tasks import problem_rows
from workers.driver.journal import JournalError, job_of_folder
from workers.protocol.job import JobSpec

NONCE_FOLDER = ".megatron-ray"


def check_task(spec: dict[str, Any], storage_path: str) -> dict[str, Any]:
    """Returns problems of a spec's paths as seen from the cluster, and notes, as JSON.

    Quick: nothing is tokenized.
    """
    # The service has validated the spec, but this code may have another version.
    try:
        job = JobSpec.from_mapping(spec)
    except ValidationError as error:
        problems = problems_from_pydantic(error.errors(), spec, model=JobSpec)
        return {"problems": problem_rows(problems), "notes": []}
    _, model_problems = resolve_initial_model(job.checkpoint, job.model)
    checked = check_data(job.data, job.training.seq_length, storage_path)
    problems = [*checked.problems, *model_problems, *_folder_problems(storage_path)]
    # Only of a storage that can be written at all.
    if not problems:
        problems += room_problems(job, storage_path)
    return {"problems": problem_rows(problems), "notes": checked.notes}


def _folder_problems(storage_path: str) -> list[Problem]:
    """Returns a problem if a new job's folder holds another job, or another run.

    Otherwise the new job would resume from the other's checkpoints and overwrite its
    records.
    """
    try:
        job = job_of_folder(storage_path)
        checkpoints = [
            info for info in list_checkpoints(storage_path) if info.was_committed
        ]
    # A journal that cannot be read still shows that the folder belongs to a job.
    except JournalError as error:
        return [_in_use(storage_path, f"another job ({error})")]
    except StorageError:
        return []  # reported by the check for writing
    if job is not None:
        return [_in_use(storage_path, f"another job ({job.job_id})")]
    if checkpoints:
        last = checkpoints[-1].step
        run = f"committed checkpoints of a run without a service, up to step {last}"
        return [_in_use(storage_path, run)]
    return []


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
