"""Brings the first ranks of a run's jobs together.

Owns: whom a job waits for, when a job is given up. Must not know: what jobs exchange, the
other ranks.

Each job shows its arrival in its heartbeat. The host decides once all living jobs have
arrived, and shows the meeting in its own; when it is lost, the next job is the host.
"""

import socket
import time
from collections.abc import Callable, Iterable

from megatron_ray.training.replica_jobs.heartbeats import Heartbeats
from megatron_ray.training.replica_jobs.membership import (
    Arrival,
    Heartbeat,
    Meeting,
    host_of,
    is_complete,
    split,
    waiting,
)

_MIN_POLL_S = 0.01
_CONNECT_S = 3.0
_PROBE_EVERY_S = 0.5


class Rendezvous:
    """Meets the other jobs."""

    def __init__(
        self,
        heartbeats: Heartbeats,
        num_groups: int,
        start_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._heartbeats = heartbeats
        self._num_groups = num_groups
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._num_arrivals = 0
        self._met = ""
        self._probed_at = clock()

    def meet(
        self,
        step: int,
        layout: str,
        is_stopped: Callable[[], bool],
        *,
        has_synchronized: bool,
    ) -> Meeting | None:
        """Returns the next meeting with this job in it; None once `is_stopped`.

        The arguments are those of an Arrival. Blocks until all living jobs have arrived.
        """
        own = self._heartbeats.own
        self._num_arrivals += 1
        arrival = Arrival(
            own.group,
            own.incarnation,
            self._num_arrivals,
            step,
            has_synchronized,
            layout,
            self._met,
        )
        self._heartbeats.renew(arrival=arrival)
        began = self._clock()
        while not is_stopped():
            read_at = self._clock()
            self._heartbeats.read()
            # A slow storage is read less often.
            pause_s = max(_MIN_POLL_S, 2 * (self._clock() - read_at))
            has_time = self._clock() - began < self._start_timeout_s
            meeting = self._look(arrival, has_time=has_time)
            if meeting is not None:
                return meeting
            time.sleep(pause_s)
        return None

    def has_met(self, meeting: Meeting) -> None:
        """Notes that this job has done what a meeting was for."""
        self._met = meeting.name

    def is_lost(self, meeting: Meeting) -> bool:
        """Returns whether any job of the meeting lives no longer."""
        living = self._heartbeats.living()
        for arrival in (*meeting.members, *meeting.behind):
            beat = living.get(arrival.group)
            if beat is None or beat.incarnation != arrival.incarnation:
                return True
        return False

    def _look(self, arrival: Arrival, *, has_time: bool) -> Meeting | None:
        """Returns the meeting with the arrival, if the host has decided."""
        living = self._heartbeats.living()
        host = host_of(living)
        is_host = host.group == arrival.group
        if self._heartbeats.own.is_host is not is_host:
            self._heartbeats.renew(is_host=is_host)
        if is_host:
            return self._decide(has_time=has_time)
        meeting = host.meeting
        if meeting is not None and meeting.includes(arrival):
            return meeting
        # The host waits for the others, and this job for the host only.
        self._give_up_ended([host])
        return None

    def _decide(self, *, has_time: bool) -> Meeting | None:
        """Returns the meeting if all have arrived, and shows it to the others."""
        living = self._heartbeats.living()
        last = self._heartbeats.own.meeting
        arrivals = waiting(living, last)
        if not is_complete(arrivals, living, self._num_groups, has_time=has_time):
            absent = set(living).difference(arrivals)
            self._give_up_ended([living[group] for group in absent])
            return None
        number = 1
        if last is not None:
            number = last.number + 1
        own = self._heartbeats.own
        members, behind = split(list(arrivals.values()))
        meeting = Meeting(own.incarnation, number, own.store, members, behind)
        self._heartbeats.renew(meeting=meeting)
        return meeting

    def _give_up_ended(self, beats: Iterable[Heartbeat]) -> None:
        """Gives up jobs whose first process has ended: its port refuses connections."""
        now = self._clock()
        if now - self._probed_at < _PROBE_EVERY_S:
            return
        self._probed_at = now
        for beat in beats:
            try:
                socket.create_connection(beat.store, _CONNECT_S).close()
            except ConnectionRefusedError:
                self._heartbeats.give_up(beat)
            except OSError:
                # The network may be slow; then the heartbeat decides.
                continue
