"""Creates, calls and removes a job's rank workers and its placement group.

Owns: get-or-create by name, one outstanding poll per rank, removal by name.

Every name is derived from job and slot, so a restarted driver finds the actors of an
earlier one. Makes no decisions. Must not know: HTTP, torch, what follows a death.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_ray.commands import Command, ProfileRequest
from workers.decisions.failures import FailureKind
from workers.decisions.peers.copies import CopyFacts, CopySet
from workers.decisions.placement import PlacementPlan, SlotFacts
from workers.decisions.ranks.diagnosis import RankEvidence
from workers.decisions.slot_assignment import WorkerToStart
from workers.rank.messages import Fence, NextReply, Poll, StartRequest
from workers.rank.spool import Line
from workers.ray.actors import find_actor, kill, worker_name
from workers.ray.answers import all_results, results_in_time
from workers.ray.deaths import Death, death_of, raise_if_fenced
from workers.ray.pending_placement import PendingPlacement

GONE_S = 10.0
"""Seconds to wait for a killed actor's name to become free."""
_GONE_CHECK_S = 0.02
_LOOKUP_THREADS = 16


@dataclass(frozen=True)
class PollResult:
    """Result of one rank's outstanding poll: a reply, or how its process died."""

    rank: int
    reply: NextReply | None = None
    death: Death | None = None


@dataclass(frozen=True)
class _OutstandingPoll:
    rank: int
    attempt: int


class WorkerGroup:
    """The workers of a job, by slot; ranks are assigned to slots after placement."""

    def __init__(self, job_id: str, namespace: str, worker_class: type) -> None:
        self._job_id = job_id
        self._namespace = namespace
        # Wrapped once, because each remote class stays in memory, here and in Ray's head.
        # Two threads for polls, because that of a replaced driver may still wait in the
        # worker when its successor polls.
        as_actor: Any = ray.remote
        groups = {"poll": 2, "inspect": 1}
        self._worker_class: Any = as_actor(concurrency_groups=groups)(worker_class)
        self._slots: dict[int, Any] = {}
        self._polls: dict[Any, _OutstandingPoll] = {}

    # ---- placement

    @property
    def is_requested(self) -> bool:
        """Whether the job has a placement group, ready or not."""
        return self._existing_group() is not None

    def placement_group(self, plan: PlacementPlan) -> PendingPlacement:
        """Returns the job's placement group, created if missing."""
        return PendingPlacement(self._get_or_create_group(plan))

    def _get_or_create_group(self, plan: PlacementPlan) -> Any:
        group = self._existing_group()
        if group is not None:
            return group
        # PACK puts the bundles on as few nodes as possible; with a domain's label they are
        # all in one domain, on as few of its nodes as possible.
        where: dict[str, Any] = {"strategy": "PACK"}
        if plan.domain_label is not None:
            where = {"topology_strategy": {plan.domain_label: "STRICT_PACK"}}
        selectors = [dict(bundle.selector) for bundle in plan.bundles]
        if any(selectors):
            where["bundle_label_selector"] = selectors
        # Detached: it outlives this driver.
        return ray.util.placement_group(
            [dict(bundle.resources) for bundle in plan.bundles],
            name=self._job_id,
            lifetime="detached",
            **where,
        )

    def _existing_group(self) -> Any | None:
        try:
            return ray.util.get_placement_group(self._job_id)
        except ValueError:
            return None

    def num_bundles(self) -> int | None:
        """Returns the size of the job's placement group; None if there is none."""
        group = self._existing_group()
        if group is None:
            return None
        return int(group.bundle_count)

    def nodes(self, plan: PlacementPlan) -> dict[int, str]:
        """Returns the node id of each bundle of the ready placement group."""
        table: dict[str, Any] = ray.util.placement_group_table(
            self._get_or_create_group(plan)
        )
        return dict(table["bundles_to_node_id"])

    def remove_placement_group(self) -> None:
        """Releases the resources; Ray kills processes that still use them."""
        group = self._existing_group()
        if group is not None:
            ray.util.remove_placement_group(group)

    # ---- workers

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots that have a worker."""
        return tuple(self._slots)

    def create(
        self, plan: PlacementPlan, workers: Iterable[WorkerToStart], num_threads: int
    ) -> None:
        """Creates workers, each in its bundle, without waiting for their start."""
        group = self._get_or_create_group(plan)
        for worker in workers:
            others = dict(worker.resources)
            options = {
                "name": worker_name(self._job_id, worker.slot),
                "namespace": self._namespace,
                "lifetime": "detached",
                "get_if_exists": True,
                # Never restarted by Ray, because a single rank cannot rejoin the others in
                # the middle of a step.
                "max_restarts": 0,
                "num_cpus": others.pop("CPU", 0),
                "num_gpus": others.pop("GPU", 0),
                "resources": others,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=worker.bundle
                ),
            }
            actor = self._worker_class.options(**options).remote(
                self._job_id, worker.slot, worker.bundle, num_threads, worker.is_spare
            )
            self._slots[worker.slot] = actor

    def adopt(self, slots: Iterable[int]) -> tuple[int, ...]:
        """Finds living workers by name; returns the slots that have none."""
        missing = []
        for slot in slots:
            actor = find_actor(worker_name(self._job_id, slot), self._namespace)
            if actor is None:
                missing.append(slot)
            else:
                self._slots[slot] = actor
        return tuple(missing)

    def probe(
        self, slots: Iterable[int], fence: Fence, timeout_s: float, stop: Callable[[], None]
    ) -> list[SlotFacts]:
        """Returns where the workers of some slots run, in slot order.

        `stop` is called while waiting and may raise to end the wait. Raises
        WorkerGroupError with the slots that died or did not start.
        """
        calls = {}
        for slot in slots:
            calls[slot] = self._slots[slot].probe.remote(fence)
        return all_results(calls, timeout_s, stop)

    def look_up(
        self, slots: Iterable[int], fence: Fence, timeout_s: float
    ) -> tuple[list[SlotFacts], tuple[int, ...]]:
        """Returns where the workers that reply in time run, and the slots of dead ones.

        Raises FencedError.
        """
        calls = {}
        for slot in slots:
            calls[self._slots[slot].probe.remote(fence)] = slot
        facts, dead = results_in_time(calls, timeout_s)
        return list(facts.values()), dead

    def start(
        self,
        fence: Fence,
        requests: Mapping[int, StartRequest],
        timeout_s: float,
        stop: Callable[[], None],
    ) -> None:
        """Starts the attempt, requests by slot. Raises WorkerGroupError."""
        calls = {}
        for slot, request in requests.items():
            calls[slot] = self._slots[slot].start.remote(fence, request)
        all_results(calls, timeout_s, stop)

    def open_store(
        self, slot: int, fence: Fence, timeout_s: float, stop: Callable[[], None]
    ) -> tuple[str, int]:
        """Returns host and port of the TCPStore that a worker serves from now on.

        Raises WorkerGroupError.
        """
        calls = {slot: self._slots[slot].open_store.remote(fence)}
        ((host, port),) = all_results(calls, timeout_s, stop)
        return host, port

    def copies(self, fence: Fence, timeout_s: float) -> dict[int, tuple[CopyFacts, ...]]:
        """Returns the copies of states in the workers that reply in time, by slot.

        Raises FencedError.
        """
        calls = {}
        for slot, actor in self._slots.items():
            calls[actor.copies.remote(fence)] = slot
        copies, _ = results_in_time(calls, timeout_s)
        return copies

    def copied_reports(
        self, slot: int, fence: Fence, copies: CopySet, timeout_s: float
    ) -> Sequence[Line]:
        """Returns the reports in rank 0's copy, which a worker has; none when it is late.

        Raises FencedError.
        """
        call = self._slots[slot].copied_reports.remote(fence, copies.attempt, copies.step)
        reports, _ = results_in_time({call: slot}, timeout_s)
        lines: Sequence[Line] = reports.get(slot, ())
        return lines

    # ---- the one outstanding poll per rank

    def poll(self, slot: int, rank: int, fence: Fence, poll: Poll) -> None:
        """Sends a rank's next poll; `collect` returns its result."""
        call = self._slots[slot].next.remote(fence, poll)
        self._polls[call] = _OutstandingPoll(rank, fence.attempt)

    def collect(self, timeout_s: float) -> list[PollResult]:
        """Returns the results of finished polls, in Ray's order of arrival.

        Waits up to `timeout_s` for the first. Raises FencedError when this driver was
        replaced.
        """
        if not self._polls:
            time.sleep(timeout_s)
            return []
        done, _ = ray.wait(list(self._polls), num_returns=1, timeout=timeout_s)
        if done:
            # After the first one, all others that have arrived are taken without waiting.
            done, _ = ray.wait(list(self._polls), num_returns=len(self._polls), timeout=0)
        return [self._poll_result(call) for call in done]

    def drop_calls(self) -> None:
        """Drops outstanding polls, as their attempt is over."""
        self._polls.clear()

    def _poll_result(self, call: Any) -> PollResult:
        poll = self._polls.pop(call)
        try:
            return PollResult(poll.rank, reply=ray.get(call))
        except RayTaskError as error:
            raise_if_fenced(error)
            death = Death(FailureKind.PROCESS_DIED, f"worker failed: {error.cause}")
        except RayError as error:
            death = death_of(error)
        if death.kind is FailureKind.PROCESS_DIED:
            death = Death(death.kind, f"{death.message}; see {self._log_command(poll)}")
        return PollResult(poll.rank, death=death)

    def _log_command(self, poll: _OutstandingPoll) -> str:
        return f"`megatron-ray logs {self._job_id} --rank {poll.rank} --attempt {poll.attempt}`"

    def command(self, slot: int, fence: Fence, command: Command) -> None:
        """Sends a command without waiting; the rank's reports show its effect."""
        self._slots[slot].command.remote(fence, command)

    # ---- examining

    def inspect(self, fence: Fence, timeout_s: float) -> dict[int, RankEvidence]:
        """Returns what the ranks of the workers that reply in time do, by slot.

        Raises FencedError.
        """
        calls = {}
        for slot, actor in self._slots.items():
            calls[actor.inspect.remote(fence)] = slot
        evidence, _ = results_in_time(calls, timeout_s)
        return evidence

    def stacks_from_outside(
        self, pids: Mapping[int, int], fence: Fence, timeout_s: float
    ) -> dict[int, str]:
        """Returns the stacks of processes that do not answer, by pid.

        `pids` maps the slot of a worker on the same node, which takes them, to the pid.
        Raises FencedError.
        """
        calls = {}
        for slot, pid in pids.items():
            calls[self._slots[slot].stacks_from_outside.remote(fence, pid)] = pid
        stacks, _ = results_in_time(calls, timeout_s)
        return stacks

    def profile(
        self, slots: Iterable[int], fence: Fence, request: ProfileRequest, timeout_s: float
    ) -> tuple[int, ...]:
        """Passes a request on to some ranks; returns the slots that have taken it.

        Their reports follow. Raises FencedError.
        """
        calls = {}
        for slot in slots:
            calls[self._slots[slot].profile.remote(fence, request)] = slot
        taken, _ = results_in_time(calls, timeout_s)
        return tuple(slot for slot in taken if taken[slot])

    # ---- removal

    def leave(
        self, fence: Fence, timeout_s: float
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Has all workers leave their process groups at once.

        Returns the slots whose process can be reused, and those that do not reply in time.
        """
        calls = {}
        for slot, actor in self._slots.items():
            calls[actor.leave.remote(fence)] = slot
        has_left, dead = results_in_time(calls, timeout_s)
        free = sorted(slot for slot in has_left if has_left[slot])
        return tuple(free), tuple(sorted(self._slots.keys() - has_left.keys() - {*dead}))

    def kill_slots(self, slots: Sequence[int]) -> None:
        """Kills the workers of some slots and waits until their names are free."""
        # All are killed before the first wait, so that they die at the same time.
        for slot in slots:
            actor = self._slots.pop(slot, None)
            # A worker that an earlier driver created may not have been adopted.
            if actor is None:
                actor = find_actor(worker_name(self._job_id, slot), self._namespace)
            if actor is not None:
                kill(actor)
        for slot in slots:
            self._await_gone(worker_name(self._job_id, slot))

    def retire(self, fence: Fence, num_slots: int, timeout_s: float) -> tuple[str, ...]:
        """Has living workers delete the job's files; returns the nodes that are clean.

        Returns none while a worker does not reply: it may be starting, and recreate the
        folder after another worker on its node has deleted it.
        """
        self.adopt(sorted(set(range(num_slots)) - set(self._slots)))
        calls = {}
        for slot, actor in self._slots.items():
            calls[actor.retire.remote(fence)] = slot
        node_ids, _ = results_in_time(calls, timeout_s)
        if len(node_ids) < len(self._slots):
            return ()
        return tuple(sorted(set(node_ids.values())))

    def remove_all(self, num_slots: int) -> None:
        """Kills every actor of the job but its driver, and removes the placement group."""
        # By name, not by `self._slots`: an earlier driver may have created more.
        self.drop_calls()
        names = [worker_name(self._job_id, slot) for slot in range(num_slots)]
        # In parallel: each look-up is a call to Ray's head, and a job may have thousands of
        # workers.
        with ThreadPoolExecutor(max_workers=_LOOKUP_THREADS) as pool:
            actors = list(pool.map(self._find, names))
        killed = []
        for name, actor in zip(names, actors, strict=True):
            if actor is not None:
                kill(actor)
                killed.append(name)
        for name in killed:
            self._await_gone(name)
        self._slots.clear()
        self.remove_placement_group()

    def _find(self, name: str) -> Any | None:
        return find_actor(name, self._namespace)

    def _await_gone(self, name: str) -> None:
        # Until then, get-or-create would return the dying actor of this name.
        deadline = time.monotonic() + GONE_S
        while self._find(name) is not None and time.monotonic() < deadline:
            time.sleep(_GONE_CHECK_S)
