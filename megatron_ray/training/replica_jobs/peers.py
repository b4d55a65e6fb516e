"""Averages over the jobs of a run, as the peers of one rank.

Owns: what the ranks of a job learn from their first rank, the group of the ranks in the
same place, whether a synchronization counts. Must not know: what is averaged, the files.

The first rank meets the other jobs; the rest read the result in its store. Only what every rank of
a job has received counts, so that they stay equal; else the jobs meet again.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

from megatron_ray.commands import Command
from megatron_ray.config.local_sgd import LocalSGDConfig, RendezvousConfig
from megatron_ray.config.problem import ConfigError
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed import collectives
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.distributed.outside_group import OutsideGroup, PeerLostError
from megatron_ray.distributed.stores import Store, connected_store, serve_store
from megatron_ray.reports import PhaseReport, ReplicaGroupsReport, Report
from megatron_ray.storage.storage import open_storage
from megatron_ray.training.replica_jobs.heartbeats import Heartbeats
from megatron_ray.training.replica_jobs.membership import Address, Heartbeat, Meeting
from megatron_ray.training.replica_jobs.rendezvous import Rendezvous

_POLL_S = 0.01
_LOOK_EVERY_S = 0.25
_REPORT_EVERY_S = 4.0
"""Less than any time after which a job without a report counts as hung."""
_MEETING = TypeAdapter(Meeting | None)


@dataclass(frozen=True)
class Place:
    """Where a rank is, for other jobs, and how it reports and learns that it is to stop."""

    mesh: ParallelMesh
    find_address: Callable[[], str]
    """Returns that of this rank's node; called only where there are other jobs."""
    report: Callable[[Report], None]
    poll: Callable[[], Command]


@contextmanager
def joined_jobs(config: TrainConfig, place: Place) -> Iterator["JobPeers | None"]:
    """Yields this rank's peers in the other jobs of its run; None where it is a single job.

    At the end the other jobs go on without this one, at once.
    """
    local_sgd = config.parallel.local_sgd
    if local_sgd is None or local_sgd.rendezvous is None:
        yield None
        return
    peers = JobPeers(local_sgd, local_sgd.rendezvous, place)
    try:
        yield peers
    finally:
        peers.close()


class JobPeers:
    """The ranks in this rank's place of the other jobs: an optimizer's SyncPeers.

    Every rank of the job must call each method, in the same order.
    """

    group_index = 0
    can_lose = True

    def __init__(
        self, config: LocalSGDConfig, rendezvous: RendezvousConfig, place: Place
    ) -> None:
        self.group = rendezvous.group
        """This job's group."""
        self._num_groups = config.groups
        self._config = rendezvous
        self._timeout = timedelta(seconds=rendezvous.lost_after_s)
        self._place = place
        self._heartbeats: Heartbeats | None = None
        self._rendezvous: Rendezvous | None = None
        self._host = place.find_address()
        self._address: Address = (self._host, 0)
        self._store = self._open_store()
        self._hosts: tuple[Address, Store] | None = None
        self._layout = ""
        self._num_meetings = 0
        self._meeting: Meeting | None = None
        self._members: tuple[tuple[int, str], ...] = ()
        self._incarnations: dict[int, str] = {}
        self._outside: OutsideGroup | None = None
        self._is_pending = False
        self._has_failed = False
        self._looked_at = 0.0
        self._reported_at = 0.0
        self._command = Command.CONTINUE

    def _open_store(self) -> Store:
        """Returns the store of the job's first rank, which serves it."""
        mesh = self._place.mesh
        store: Store | None = None
        if mesh.rank == 0:
            served = serve_store(self._host)
            self._address = (self._host, served.port)
            store = served
        address: list[Address] = [self._address]
        if mesh.world_group is not None:
            dist.broadcast_object_list(
                address, group=mesh.world_group, group_src=0, device=mesh.device
            )
        return store or connected_store(*address[0], self._timeout)

    def _appear(self) -> None:
        """Shows this job to the others, which wait for it from now on."""
        if self._place.mesh.rank != 0:
            return
        self._heartbeats = Heartbeats(
            open_storage(self._config.path),
            Heartbeat(self.group, secrets.token_hex(8), self._address),
            self._num_groups,
            self._config.lost_after_s,
            self._mark_lost,
        )
        self._rendezvous = Rendezvous(
            self._heartbeats, self._num_groups, self._config.start_timeout_s
        )

    def close(self) -> None:
        """Leaves the other jobs, which go on at once."""
        if self._heartbeats is not None:
            self._heartbeats.close()
        if self._outside is not None:
            self._outside.abort()

    # ---- meetings

    @property
    def pending(self) -> Meeting | None:
        """The last meeting, if some of its jobs have yet to get the state of another."""
        if self._is_pending:
            return self._meeting
        return None

    def end_meeting(self) -> None:
        """Notes that this job has taken or given the states of the last meeting."""
        self._is_pending = False
        self._note_met()

    def _note_met(self) -> None:
        """Notes that this job has done what the last meeting was for."""
        if self._rendezvous is not None and self._meeting is not None:
            self._rendezvous.has_met(self._meeting)

    def join(self, step: int, layout: str) -> None:
        """Meets the other jobs before the first step after `step`.

        `layout` is that of the job's state. Raises ConfigError when it is not the others'.
        """
        self._layout = layout
        self._appear()
        self._meet(step, has_synchronized=True)

    def meet(self, step: int) -> bool:
        """Returns whether this job is to synchronize what is due after a step.

        Raises ConfigError as `join` does.
        """
        meeting = self._meet(step, has_synchronized=False)
        if meeting is None or meeting.index_of(self.group) is None:
            return False
        self._has_failed = not self._connect(meeting)
        return True

    def _meet(self, step: int, *, has_synchronized: bool) -> Meeting | None:
        """Returns the next meeting; None when the job is to stop first."""
        self._num_meetings += 1
        self._reported_at = time.monotonic()
        key = f"meeting/{self._num_meetings}"
        if self._rendezvous is not None:
            meeting = self._rendezvous.meet(
                step, self._layout, self._is_stopped, has_synchronized=has_synchronized
            )
            self._store.set(key, _MEETING.dump_json(meeting).decode())
        else:
            while not self._store.check([key]):
                self._report_wait()
                time.sleep(_POLL_S)
            meeting = _MEETING.validate_json(self._store.get(key))
        self._meeting = meeting
        if meeting is not None:
            self._check_layout(meeting)
            self._is_pending = bool(meeting.behind)
            self._report_changes(step, meeting)
        return meeting

    def _report_changes(self, step: int, meeting: Meeting) -> None:
        """Reports which jobs are there, if they are not those of the meeting before."""
        before = self._incarnations
        now = {}
        for arrival in (*meeting.members, *meeting.behind):
            now[arrival.group] = arrival.incarnation
        self._incarnations = now
        joined = {group for group, _ in now.items() - before.items()} - {self.group}
        lost = before.keys() - now.keys()
        if joined or lost or not before:
            self._place.report(
                ReplicaGroupsReport(
                    step,
                    tuple(sorted(now)),
                    self._num_groups,
                    tuple(sorted(joined)),
                    tuple(sorted(lost)),
                )
            )

    def _check_layout(self, meeting: Meeting) -> None:
        """Raises ConfigError if this job's layout is not that of the first member."""
        first = meeting.members[0]
        own = self.group
        for arrival in (*meeting.members, *meeting.behind):
            if arrival.group == own and arrival.layout != first.layout:
                raise ConfigError(
                    f"/parallel: group {own} has another layout than group {first.group}; "
                    "all groups need the same model, optimizer and parallel sizes"
                )

    def poll(self) -> Command:
        """Returns the newest command to this rank, also one that came while it waited."""
        command = max(self._command, self._place.poll())
        self._command = Command.CONTINUE
        return command

    def _is_stopped(self) -> bool:
        """Returns whether the job is to stop; reports that it waits."""
        self._report_wait()
        self._command = max(self._command, self._place.poll())
        return self._command.stops

    def _report_wait(self) -> None:
        now = time.monotonic()
        if now - self._reported_at > _REPORT_EVERY_S:
            self._reported_at = now
            self._place.report(PhaseReport("replica groups", _REPORT_EVERY_S))

    # ---- averages

    def _connect(self, meeting: Meeting) -> bool:
        """Connects this rank with those in its place; returns whether all have come."""
        members = tuple([(each.group, each.incarnation) for each in meeting.members])
        if members == self._members:
            return True
        self._drop()
        if len(members) > 1:
            try:
                self._outside = self.connected(
                    "means", meeting.index_of(self.group) or 0, len(members)
                )
            except PeerLostError:
                return False
        self._members = members
        return True

    def connected(self, purpose: str, index: int, size: int) -> OutsideGroup:
        """Returns a group of ranks of the meeting's jobs in this rank's place.

        Raises PeerLostError.
        """
        assert self._meeting is not None
        meeting = self._meeting
        return OutsideGroup(
            self._store_of(meeting),
            f"{meeting.name}/{purpose}/{self._place.mesh.rank}",
            index,
            size,
            self._host,
            self._timeout,
            self._is_lost,
        )

    def _store_of(self, meeting: Meeting) -> Store:
        """Raises PeerLostError."""
        if self._hosts is None or self._hosts[0] != meeting.store:
            host, port = meeting.store
            try:
                store = connected_store(host, port, self._timeout)
            except RuntimeError as error:
                raise PeerLostError(f"the store of a job is lost: {error}") from error
            self._hosts = (meeting.store, store)
        return self._hosts[1]

    def mean(self, flat: Tensor) -> None:
        """Replaces a flat tensor by its mean over the jobs, until one of them is lost."""
        if self._outside is None or self._has_failed:
            return
        try:
            self._outside.mean(flat)
        except PeerLostError:
            self._has_failed = True

    def confirm(self) -> bool:
        """Returns whether every rank of this job has the means of the last meeting."""
        if self.any_rank(self._has_failed):
            self._drop()
            return False
        self._note_met()
        return True

    def any_rank(self, has_failed: bool) -> bool:
        """Returns whether anything has failed on any rank of this job."""
        mesh = self._place.mesh
        failures = torch.tensor(float(has_failed), device=mesh.device)
        return bool(collectives.all_reduce(failures, mesh.world_group).item())

    def _drop(self) -> None:
        if self._outside is not None:
            self._outside.abort()
        self._outside = None
        self._members = ()

    # ---- lost jobs

    def _mark_lost(self) -> None:
        """Notes for the job's ranks that a job of the meeting is lost; in another thread."""
        meeting = self._meeting
        if self._rendezvous is not None and meeting is not None:
            if self._rendezvous.is_lost(meeting):
                self._store.set(_lost_key(meeting), "")

    def _is_lost(self) -> bool:
        """Returns whether a job of the meeting is lost."""
        now = time.monotonic()
        if self._meeting is None or now - self._looked_at < _LOOK_EVERY_S:
            return False
        self._looked_at = now
        self._report_wait()
        return self._store.check([_lost_key(self._meeting)])


def _lost_key(meeting: Meeting) -> str:
    return f"lost/{meeting.name}"
