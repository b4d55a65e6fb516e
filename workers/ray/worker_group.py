"""A job's actors and placement group.

Owns: get-or-create by name, one outstanding call per rank, ends by name.

Every name is derived from job and slot, so that a restarted driver finds what an
earlier one made. Decides nothing. Must not know: HTTP, torch, what follows a death.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_ray.commands import Command
from workers.decisions.failures import FailureKind
from workers.decisions.placement import PlacementPlan, SlotFacts
from workers.decisions.slot_assignment import WorkerToStart
from workers.exceptions import WorkersError
from workers.rank.messages import Fence, FencedError, NextReply, Poll, StartOrder
from workers.ray.nodes import NODE_ID_LABEL

GONE_S = 10.0
"""How long a killed actor's name may linger."""


class WorkerGroupError(WorkersError):
    """Actors that did not come up; `dead_slots` names those that must be made anew,
    `kind` says of what they died.
    """

    def __init__(
        self,
        message: str,
        dead_slots: Iterable[int] = (),
        kind: FailureKind = FailureKind.START,
    ) -> None:
        super().__init__(message)
        self.dead_slots = tuple(dead_slots)
        self.kind = kind


@dataclass(frozen=True)
class Death:
    """How an actor ended, as far as Ray tells."""

    kind: FailureKind
    words: str


@dataclass(frozen=True)
class Answer:
    """What came of one rank's outstanding call: a reply, or how its process ended."""

    rank: int
    reply: NextReply | None = None
    death: Death | None = None


def driver_name(job_id: str) -> str:
    """Name of a job's driver actor."""
    return f"{job_id}/driver"


def worker_name(job_id: str, slot: int) -> str:
    """Name of a slot's worker actor."""
    return f"{job_id}/w{slot}"


def find_actor(name: str, namespace: str) -> Any | None:
    """The living actor of that name, or None."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


class WorkerGroup:
    """Workers by slot; ranks come with the map, after placement."""

    def __init__(self, job_id: str, namespace: str, worker_class: type) -> None:
        self._job_id = job_id
        self._namespace = namespace
        # Once, as every remote class that is made stays in memory, here and with Ray's
        # head.
        as_actor: Any = ray.remote
        self._worker_class: Any = as_actor(concurrency_groups={"poll": 2})(worker_class)
        self._slots: dict[int, Any] = {}
        self._calls: dict[Any, int] = {}

    # ---- placement

    def placement_group(self, plan: PlacementPlan) -> Any:
        """The job's placement group (Ray's handle), made unless it is there."""
        try:
            return ray.util.get_placement_group(self._job_id)
        except ValueError:
            selector = (
                {NODE_ID_LABEL: f"!in({','.join(plan.avoid_nodes)})"}
                if plan.avoid_nodes
                else {}
            )
            return ray.util.placement_group(
                [dict(bundle.resources) for bundle in plan.bundles],
                strategy="PACK",
                name=self._job_id,
                lifetime="detached",
                bundle_label_selector=[selector] * len(plan.bundles) if selector else None,
            )

    def nodes(self, plan: PlacementPlan) -> dict[int, str]:
        """Id of the node that each bundle of the ready placement group lies on."""
        table: dict[str, Any] = ray.util.placement_group_table(self.placement_group(plan))
        return dict(table["bundles_to_node_id"])

    def remove_placement_group(self) -> None:
        """Gives the resources back; what still runs in them is killed by Ray."""
        with contextlib.suppress(ValueError):
            ray.util.remove_placement_group(ray.util.get_placement_group(self._job_id))

    # ---- workers

    def create(
        self, plan: PlacementPlan, recruits: Iterable[WorkerToStart], num_threads: int
    ) -> None:
        """Makes workers, each in its bundle; they need not be up yet."""
        group = self.placement_group(plan)
        for recruit in recruits:
            options = {
                "name": worker_name(self._job_id, recruit.slot),
                "namespace": self._namespace,
                "lifetime": "detached",
                "get_if_exists": True,
                "max_restarts": 0,
                "num_cpus": recruit.resources.get("CPU", 0),
                "num_gpus": recruit.resources.get("GPU", 0),
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=recruit.bundle
                ),
            }
            actor = self._worker_class.options(**options).remote(
                self._job_id, recruit.slot, recruit.bundle, num_threads, recruit.is_spare
            )
            self._slots[recruit.slot] = actor

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
        """Where some workers are.

        Raises WorkerGroupError naming the slots that died or did not come up.
        """
        return self._all(
            {slot: self._slots[slot].probe.remote(fence) for slot in slots}, timeout_s, stop
        )

    def look_up(
        self, slots: Iterable[int], fence: Fence, timeout_s: float
    ) -> tuple[list[SlotFacts], tuple[int, ...]]:
        """Where those workers are that answer in time, and the slots of those that are
        dead.

        Raises Fenced.
        """
        found, dead = _in_time(
            {self._slots[slot].probe.remote(fence): slot for slot in slots}, timeout_s
        )
        return list(found.values()), dead

    def start(
        self,
        fence: Fence,
        orders: Mapping[int, StartOrder],
        timeout_s: float,
        stop: Callable[[], None],
    ) -> None:
        """Starts the attempt, orders by slot. Raises WorkerGroupError."""
        self._all(
            {
                slot: self._slots[slot].start.remote(fence, order)
                for slot, order in orders.items()
            },
            timeout_s,
            stop,
        )

    def open_store(
        self, slot: int, fence: Fence, timeout_s: float, stop: Callable[[], None]
    ) -> tuple[str, int]:
        """Host and port of the TCPStore that a worker serves from now on.

        Raises WorkerGroupError.
        """
        ((host, port),) = self._all(
            {slot: self._slots[slot].open_store.remote(fence)}, timeout_s, stop
        )
        return host, port

    def _all(
        self, calls: Mapping[int, Any], timeout_s: float, stop: Callable[[], None]
    ) -> list[Any]:
        """Results in slot order; `stop` may raise to end the wait."""
        deadline = time.monotonic() + timeout_s
        waiting = list(calls.values())
        while waiting and time.monotonic() < deadline:
            stop()
            _, waiting = ray.wait(
                waiting,
                num_returns=len(waiting),
                timeout=min(0.2, max(0.0, deadline - time.monotonic())),
            )
        late = [slot for slot, call in calls.items() if call in waiting]
        if late:
            raise WorkerGroupError(
                f"slots {late} did not answer within {timeout_s:g} s", late
            )
        results = []
        dead = {}
        for slot in sorted(calls):
            try:
                results.append(ray.get(calls[slot]))
            except RayTaskError as error:
                raise_if_fenced(error)
                dead[slot] = Death(FailureKind.START, str(error.cause))
            except RayError as error:
                dead[slot] = death_of(error)
        if dead:
            slot, death = next(iter(dead.items()))
            raise WorkerGroupError(f"slot {slot}: {death.words}", dead, death.kind)
        return results

    # ---- the one outstanding call per rank

    def poll(self, slot: int, rank: int, fence: Fence, poll: Poll) -> None:
        """Makes the rank's next call."""
        self._calls[self._slots[slot].next.remote(fence, poll)] = rank

    def collect(self, timeout_s: float) -> list[Answer]:
        """Calls that came back, in the order of their arrival as far as Ray tells.

        Raises Fenced when this driver was replaced.
        """
        if not self._calls:
            time.sleep(timeout_s)
            return []
        done, _ = ray.wait(list(self._calls), num_returns=1, timeout=timeout_s)
        if done:
            done, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        return [self._answer(call, self._calls.pop(call)) for call in done]

    def drop_calls(self) -> None:
        """Forgets outstanding calls: their attempt is over."""
        self._calls.clear()

    def _answer(self, call: Any, rank: int) -> Answer:
        try:
            return Answer(rank, reply=ray.get(call))
        except RayTaskError as error:
            raise_if_fenced(error)
            return Answer(
                rank,
                death=Death(FailureKind.PROCESS_DIED, f"its worker failed: {error.cause}"),
            )
        except RayError as error:
            return Answer(rank, death=death_of(error))

    def command(self, slot: int, fence: Fence, command: Command) -> None:
        """Sends a command; whether it arrived shows in what the rank does."""
        self._slots[slot].command.remote(fence, command)

    # ---- ends

    def leave(self, fence: Fence, timeout_s: float) -> tuple[int, ...]:
        """Asks all workers to leave their groups, at once; returns the slots whose
        process may be used again.
        """
        left, _ = _in_time(
            {actor.leave.remote(fence): slot for slot, actor in self._slots.items()},
            timeout_s,
        )
        return tuple(sorted(slot for slot, free in left.items() if free))

    def kill_slots(self, slots: Sequence[int]) -> None:
        """Ends the workers of some slots and waits until their names are free."""
        for slot in slots:
            actor = self._slots.pop(slot, None) or find_actor(
                worker_name(self._job_id, slot), self._namespace
            )
            if actor is not None:
                kill(actor)
        for slot in slots:
            self._await_gone(worker_name(self._job_id, slot))

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots with a worker."""
        return tuple(self._slots)

    def retire(self, fence: Fence, num_slots: int, timeout_s: float) -> tuple[str, ...]:
        """Has living workers remove the job's files; returns the nodes where that is
        done.

        None as long as a worker is silent: it may be starting, and make its folder
        after a neighbour has removed it.
        """
        self.adopt(slot for slot in range(num_slots) if slot not in self._slots)
        cleaned, _ = _in_time(
            {actor.retire.remote(fence): slot for slot, actor in self._slots.items()},
            timeout_s,
        )
        return (
            tuple(sorted(set(cleaned.values()))) if len(cleaned) == len(self._slots) else ()
        )

    def remove_all(self, num_slots: int) -> None:
        """Ends every actor of the job but its driver, and gives the placement group
        back.
        """
        self.drop_calls()
        names = [worker_name(self._job_id, slot) for slot in range(num_slots)]
        with ThreadPoolExecutor(max_workers=16) as pool:
            found = pool.map(lambda name: (name, find_actor(name, self._namespace)), names)
        killed = [(name, actor) for name, actor in found if actor is not None]
        for _, actor in killed:
            kill(actor)
        for name, _ in killed:
            self._await_gone(name)
        self._slots.clear()
        self.remove_placement_group()

    def _await_gone(self, name: str) -> None:
        deadline = time.monotonic() + GONE_S
        while find_actor(name, self._namespace) is not None and time.monotonic() < deadline:
            time.sleep(0.02)


def _in_time(
    calls: Mapping[Any, int], timeout_s: float
) -> tuple[dict[int, Any], tuple[int, ...]]:
    """Answers by slot, of those that come in time, and the slots whose call failed:
    most likely they are dead. Raises Fenced.
    """
    done, _ = (
        ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
        if calls
        else ([], [])
    )
    answers = {}
    failed = []
    for call in done:
        try:
            answers[calls[call]] = ray.get(call)
        except RayTaskError as error:
            raise_if_fenced(error)
            failed.append(calls[call])
        except RayError:
            failed.append(calls[call])
    return answers, tuple(failed)


def kill(actor: Any) -> None:
    """Ends an actor for good; nothing happens when it is dead."""
    with contextlib.suppress(RayError, ValueError):
        ray.kill(actor, no_restart=True)


def raise_if_fenced(error: RayTaskError) -> None:
    """A worker that knows a newer driver says so through Ray's wrapper."""
    if isinstance(error.cause, FencedError):
        raise error.cause from error


def death_of(error: RayError) -> Death:
    """Kind, and the part of Ray's long text that a person wants."""
    text = str(error)
    words = _words_of_death(text) or f"its process died: {type(error).__name__}"
    if isinstance(error, RayActorError) and error.preempted:
        return Death(FailureKind.PREEMPTED, f"its node was preempted: {words}")
    if "node has died" in text or "node is dead" in text or "node was terminated" in text:
        return Death(FailureKind.NODE_LOST, words)
    if "running low on memory" in text or "OutOfMemory" in text:
        return Death(
            FailureKind.NODE_MEMORY,
            f"Ray ended it because the node was running out of memory: {words}",
        )
    return Death(FailureKind.PROCESS_DIED, words)


def _words_of_death(text: str) -> str | None:
    if (
        "connection error code 2. End of file" in text
    ):  # all that Ray knows of a process that was killed
        return (
            "its process died without a word: killed by a signal, as the kernel does when "
            "memory runs out, or crashed; see its log"
        )
    for line in text.splitlines():
        for mark in (
            "Worker exit detail:",
            "The actor died because",
            "The actor is dead because",
        ):
            if mark in line:
                words = (
                    line[line.index(mark) :]
                    .removeprefix("Worker exit detail:")
                    .partition("Some common causes")[0]
                    .strip()
                )
                return (
                    f"its process died: {words}"
                    if "process" not in words.lower()[:20]
                    else words
                )
    return None
