"""Continues a job from the state of another one of its run.

Owns: who sends to whom after a meeting, and that all ranks of a job continue or none.
"""

from collections.abc import Callable

import torch

from megatron_ray.checkpoint.index import plan_copy, size_of
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.distributed.outside_group import PeerLostError
from megatron_ray.training.progress import Progress
from megatron_ray.training.replica_jobs.membership import Arrival
from megatron_ray.training.replica_jobs.peers import JobPeers
from megatron_ray.training.replica_jobs.transfer import receive_state, send_state
from megatron_ray.training.saving import TrainingSaver
from megatron_ray.training.state_copy import StateCopy, copy_state, layout_of


class JobExchange:
    """Gives the state of this rank to jobs behind it, or takes that of one ahead.

    `load` loads a copy and returns its progress. Every rank of the job must call each
    method.
    """

    def __init__(
        self,
        peers: JobPeers,
        mesh: ParallelMesh,
        saver: TrainingSaver,
        load: Callable[[StateCopy], Progress],
    ) -> None:
        self._peers = peers
        self._mesh = mesh
        self._saver = saver
        self._load = load

    @property
    def is_due(self) -> bool:
        """Whether the last meeting had jobs behind the others."""
        return self._peers.pending is not None

    def join(self, progress: Progress) -> Progress:
        """Waits for the other jobs; returns where this one begins."""
        layout = layout_of(plan_copy(self._saver.state()))
        self._peers.join(progress.step, f"{self._mesh.world_size} ranks, {layout}")
        return self.exchange(progress)

    def exchange(self, progress: Progress) -> Progress:
        """Sends or takes what the last meeting asks for; returns where the job goes on.

        Raises PeerLostError when the job that this one was to continue from is lost.
        """
        meeting = self._peers.pending
        if meeting is None:
            return progress
        index = meeting.index_of(self._peers.group)
        if index is None:
            progress = self._take()
        elif index == 0:
            self._give(meeting.behind, progress)
        self._peers.end_meeting()
        return progress

    def _take(self) -> Progress:
        """Continues from the state that this rank is sent."""
        copy: StateCopy | None = None
        lost: PeerLostError | None = None
        try:
            group = self._peers.connected(f"state/{self._peers.group}", 1, 2)
            copy = receive_state(group)
            group.abort()
        except PeerLostError as error:
            lost = error
        if self._peers.any_rank(copy is None) or copy is None:
            raise PeerLostError(
                "the job that this one was to continue from is lost"
            ) from lost
        return self._load(copy)

    def _give(self, behind: tuple[Arrival, ...], progress: Progress) -> None:
        """Sends this rank's state to each job behind; one that is lost gets none."""
        slots = plan_copy(self._saver.state())
        memory = torch.empty(size_of(slots), dtype=torch.uint8)
        copy, wait = copy_state(self._saver, slots, memory, self._mesh.device, progress)
        wait()
        for arrival in behind:
            try:
                group = self._peers.connected(f"state/{arrival.group}", 0, 2)
                send_state(copy, group)
                group.abort()
            except PeerLostError:
                # It starts again, and joins at a later meeting.
                continue
