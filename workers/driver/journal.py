"""Keeps the journal of a job: `attempts/NNNN.json` under its folder.

Owns: the files, and the start orders that follow from an entry. Must not know: Ray,
torch, HTTP.

A whole entry is written before the driver acts, and read by the next incarnation. The
database stores the desired state and the history; the journal stores how the job runs,
so that recovery works while the service is down.
"""

import json
from dataclasses import dataclass

from pydantic import ValidationError

from megatron_ray.checkpoint.records.rollbacks import steps_left_out
from megatron_ray.storage.storage import Storage, open_storage
from workers.decisions.journal_entry import FORMAT_VERSION, JournalEntry
from workers.decisions.peers.partners import partners
from workers.decisions.preflight.measured_nodes import MeasuredNodes
from workers.decisions.preflight.orders import PreflightOrder, preflight_orders
from workers.exceptions import WorkersError
from workers.rank.environment import RankEnv
from workers.rank.messages import CopySource, RecheckOrder, StartRequest

FOLDER = "attempts"


class JournalError(WorkersError):
    """A journal cannot be used; the message names the file and the reason."""


class ForeignJournalError(WorkersError):
    """The folder belongs to another job; checkpoints of two jobs must not be mixed."""

    def __init__(self, job_dir: str, owner: str) -> None:
        super().__init__(
            f"{job_dir} belongs to {owner}; give this job a storage.path of its own, or "
            "leave it out"
        )
        self.owner = owner


class Journal:
    """The entries of one job, in its storage.

    Methods raise StorageError.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def write(self, entry: JournalEntry) -> None:
        """Replaces the entry of its attempt, atomically and durably."""
        self._storage.write_bytes_atomic(
            _name(entry.attempt), entry.model_dump_json(indent=1).encode()
        )

    def latest(self) -> JournalEntry | None:
        """Returns the entry of the highest attempt; None for a new job.

        Raises JournalError when the file is not a valid entry.
        """
        # Numbers, not names: attempt 10000 has five digits.
        attempts = []
        for file in self._storage.list(FOLDER):
            stem, _, extension = file.name.rpartition(".")
            if extension == "json" and stem.isdigit():
                attempts.append(int(stem))
        if not attempts:
            return None
        name = _name(max(attempts))
        try:
            return JournalEntry.model_validate(json.loads(self._storage.read_bytes(name)))
        except (ValueError, ValidationError) as error:
            raise JournalError(
                f"{self._storage.uri(name)} is not a journal entry of format "
                f"{FORMAT_VERSION}: {error}"
            ) from error


@dataclass(frozen=True)
class FolderJob:
    """The job of a service that a folder belongs to."""

    job_id: str
    has_ended: bool


def job_of_folder(path: str) -> FolderJob | None:
    """Returns the job whose journal is in a folder; None without one.

    Raises StorageError, JournalError when the journal cannot be read.
    """
    entry = Journal(open_storage(path)).latest()
    if entry is None:
        return None
    return FolderJob(entry.job_id, entry.ending is not None)


def start_orders(entry: JournalEntry, accelerator: str) -> dict[int, StartRequest]:
    """Returns the start order of each slot's worker, from the journal alone.

    Raises ValueError before the rank map and the data are known.
    """
    needs_store = len(entry.ranks) > 1
    spec = entry.attempt_spec
    if spec is None or entry.prepared is None or (needs_store and not entry.store):
        raise ValueError(f"attempt {entry.attempt} has no spec, data or store yet")
    master_addr, master_port = entry.store or (None, None)
    copies_by_rank = _copy_sources(entry)
    partner_of = _partners(entry)
    preflight_of = _preflight_orders(entry)
    recheck = _recheck_order(entry)
    # Ray makes only the worker's own GPU visible, so its index is always 0 there.
    device = "cpu"
    if accelerator == "gpu":
        device = "cuda"
    orders = {}
    for place in entry.ranks:
        env = RankEnv(
            rank=place.rank,
            world_size=len(entry.ranks),
            local_rank=place.local_rank,
            local_world_size=place.local_world_size,
            node_rank=place.node_rank,
            master_addr=master_addr,
            master_port=master_port,
        )
        orders[place.slot] = StartRequest(
            env=env,
            spec=spec,
            data=entry.prepared,
            attempt=entry.attempt,
            device=device,
            gpu=place.gpu,
            store=entry.store,
            resume_from=entry.resumed_from,
            left_out=steps_left_out(entry.rollbacks),
            recheck=recheck,
            partner=partner_of.get(place.rank),
            copy=copies_by_rank.get(place.rank),
            preflight=preflight_of.get(place.rank),
        )
    return orders


def _recheck_order(entry: JournalEntry) -> RecheckOrder:
    """Returns the step that was computed elsewhere before, if there is one."""
    recheck = entry.recheck
    if recheck is None:
        return RecheckOrder()
    nodes = {place.node_id for place in entry.ranks}
    has_moved = recheck.node_id not in nodes
    return RecheckOrder(recheck.step, recheck.rank, has_moved=has_moved)


def _preflight_orders(entry: JournalEntry) -> dict[int, PreflightOrder]:
    """Returns what each rank measures before it trains, if it does."""
    config = entry.preflight
    if config is None:
        return {}
    nodes = MeasuredNodes(entry.ranks).by_rank
    return dict(enumerate(preflight_orders(nodes, config.timeout_s)))


def _partners(entry: JournalEntry) -> dict[int, int]:
    """Returns the rank that keeps each rank's copy; none for a job without copies."""
    # Specs of earlier versions lack the field.
    checkpoint = (entry.spec or {}).get("checkpoint") or {}
    if checkpoint.get("peer_every_steps") is None or len(entry.ranks) == 1:
        return {}
    nodes = []
    for place in entry.ranks:
        nodes.append(place.node_id)
    return dict(enumerate(partners(nodes)))


def _copy_sources(entry: JournalEntry) -> dict[int, CopySource]:
    """Returns where each rank finds the copy that it continues from.

    None where a process with a copy is no rank of the attempt.
    """
    if entry.copies is None:
        return {}
    rank_of = {}
    for place in entry.ranks:
        rank_of[place.slot] = place.rank
    sources = {}
    for rank, slot in enumerate(entry.copies.holders):
        if slot not in rank_of:
            return {}
        sources[rank] = CopySource(entry.copies.attempt, entry.copies.step, rank_of[slot])
    return sources


def _name(attempt: int) -> str:
    return f"{FOLDER}/{attempt:04d}.json"
