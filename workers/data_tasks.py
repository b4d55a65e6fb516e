"""CPU work that runs as Ray tasks: data, storage checks, files of dead ranks.

Owns: the bodies, plain functions. Torch- and ray-free.

Each returns plain values, a user's mistake included, so that nothing of the library
needs to be pickled.
"""

import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_ray.checkpoint.directory import latest_committed
from megatron_ray.checkpoint.initial_model import begin
from megatron_ray.config.model import ModelConfig
from megatron_ray.config.problem import Problem
from megatron_ray.data.check import check_data
from megatron_ray.data.prepare import UnusableDataError, prepare
from megatron_ray.data.prepared import PreparedData
from megatron_ray.storage.storage import StorageError, open_storage
from megatron_ray.validation.resolution import with_vocabulary
from workers.driver.journal import Journal, JournalError
from workers.protocol.job import JobSpec
from workers.rank.spool import Line, SpoolReader

_DYING_S = 0.3
_SWEEPS = 10
NONCE_FOLDER = ".megatron-ray"


def prepare_data(
    spec: JobSpec, progress: Callable[[str], None] | None = None
) -> PreparedData:
    """The data of a spec with a storage path, prepared under it or in data.cache; its
    tokens fit the model, and the model the weights that it begins with.

    Raises UnusableDataError, StorageError.
    """
    cache = spec.data_cache
    if cache is None:
        raise ValueError("storage.path is not resolved")
    model = _beginning(spec)
    length = spec.training.seq_length
    if progress is None:
        found = prepare(spec.data, cache, seq_length=length)
    else:
        found = prepare(spec.data, cache, seq_length=length, progress=progress)
    try:
        with_vocabulary(spec.model_copy(update={"model": model}), found.vocab_size)
    except ValueError as error:
        raise UnusableDataError(
            [Problem("/model/vocab_size", "vocab_fits", str(error))]
        ) from error
    return found


def _beginning(spec: JobSpec) -> ModelConfig:
    """The model, with the vocabulary of the weights that the job begins with, which it
    no longer needs once it has a checkpoint of its own. Raises UnusableDataError.
    """
    if (
        spec.storage is not None
        and spec.checkpoint.start_from
        and latest_committed(spec.storage.path) is not None
    ):
        return spec.model
    model, problems = begin(spec.checkpoint, spec.model)
    if problems:
        raise UnusableDataError(problems)
    return model


def prepare_task(spec: dict[str, Any]) -> dict[str, Any]:
    """`{"prepared": PreparedData}` or `{"problems": [...]}`; anything else that goes
    wrong is raised.
    """
    try:
        return {
            "prepared": prepare_data(JobSpec.from_mapping(spec)).model_dump(mode="json")
        }
    except UnusableDataError as found:
        return {"problems": problem_rows(found.problems)}


def check_task(spec: dict[str, Any], storage_path: str) -> list[dict[str, str]]:
    """What is wrong with a spec's paths, seen from the cluster; quick, nothing is
    tokenized.
    """
    try:
        job = JobSpec.from_mapping(spec)
    except ValidationError as error:
        return [
            {
                "pointer": "/" + "/".join(map(str, row["loc"])),
                "code": str(row["type"]),
                "detail": row["msg"],
            }
            for row in error.errors()
        ]
    _, contradictions = begin(job.checkpoint, job.model)
    return problem_rows(
        [
            *check_data(job.data, job.training.seq_length, storage_path),
            *contradictions,
            *_taken(storage_path),
        ]
    )


def _taken(storage_path: str) -> list[Problem]:
    """A new job's folder must not hold another job: its checkpoints would be taken for
    this one's, and its records overwritten.
    """
    try:
        found = Journal(open_storage(storage_path)).latest()
        owner = found.job_id if found else None
    except JournalError as problem:
        owner = str(problem)
    except StorageError:
        return []  # already said by the check for writing
    if owner is None:
        return []
    text = (
        f"{storage_path} holds another job already ({owner}); give this job a folder of its "
        "own, or leave storage.path out"
    )
    return [Problem("/storage/path", "in_use", text)]


def problem_rows(problems: list[Problem]) -> list[dict[str, str]]:
    """Problems as wire.ProblemMessage fields."""
    return [
        {"pointer": problem.pointer, "code": problem.code, "detail": problem.detail}
        for problem in problems
    ]


def write_nonce(root: str) -> tuple[str, str]:
    """Writes a random word below the storage root; returns (file name, word).

    Raises StorageError.
    """
    name = f"{NONCE_FOLDER}/nonce-{secrets.token_hex(4)}"
    word = secrets.token_hex(16)
    open_storage(root).write_bytes_atomic(name, word.encode())
    return name, word


def nonce_matches(root: str, name: str, word: str) -> bool:
    """Whether this node reads the word that the agent wrote: the storage is one
    namespace.
    """
    try:
        return open_storage(root).read_bytes(name).decode() == word
    except (StorageError, UnicodeDecodeError):
        return False


def salvage_task(
    report_file: str, after: int, log_file: str, log_offset: int, log_bytes: int
) -> tuple[list[Line], bytes]:
    """What a dead rank left on its node: reports beyond the cursor, and the rest of its
    log.
    """
    lines = SpoolReader(Path(report_file)).read(after, limit=1_000_000)
    try:
        with open(log_file, "rb") as file:
            size = file.seek(0, 2)
            file.seek(min(size, max(log_offset, size - log_bytes)))
            return lines, file.read(log_bytes)
    except OSError:
        return lines, b""


def sweep_task(folder: str) -> None:
    """Removes a job's files on a node, and what comes back: a process that Ray calls
    dead may still be dying, and write.
    """
    for _ in range(_SWEEPS):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_DYING_S)
        if not Path(folder).exists():
            break
