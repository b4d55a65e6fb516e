"""Makes the faults of a schedule in a running stack.

Owns: the nodes that come and go, who is hit. Must not know: when, and what follows.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from service.local_stack.ray_head import ray_environment
from service.local_stack.sessions import Session
from tests.support.chaos.schedule import OF_NODES, Fault, FaultKind, Strike
from tests.support.fault_injection import Observer, kill, service_away, until, wait_until
from tests.support.faulty_storage.mounted import FaultyStorage
from tests.support.joined_node import JoinedNode
from tests.support.running_stack import Road

_JOINED_S = 60.0
_TRIES = 10
_ALIVE_S = 180.0
"""A driver on a frozen node starts elsewhere only after Ray has noticed, a minute later."""


class Nodes:
    """Further nodes of the stack's Ray, always as many as at first."""

    def __init__(self, road: Road, num_nodes: int, num_cpus: int) -> None:
        self._road = road
        self._num_nodes = num_nodes
        self._num_cpus = num_cpus
        self.living: list[JoinedNode] = []

    def refill(self) -> None:
        """Joins nodes in place of those that were lost, one after the other."""
        for _ in range(_TRIES):
            if len(self.living) == self._num_nodes:
                return
            known = self._alive()
            node = self._join()
            # On a busy machine a raylet may end while it starts.
            if wait_until(partial(self._has_more_than, known), _JOINED_S):
                self.living.append(node)
            else:
                node.kill()
        raise AssertionError(f"nodes do not join in {_TRIES} tries")

    def _join(self) -> JoinedNode:
        record = self._road.record
        environment = ray_environment(record.ray_token, Path(record.temp_dir))
        return JoinedNode(record.ray_address, self._num_cpus, environment)

    def _alive(self) -> set[str]:
        """Returns the nodes that the agent reports as alive."""
        (cluster,) = self._road.client.cluster()["data"]
        return {node["node_id"] for node in cluster["nodes"] if node["alive"]}

    def _has_more_than(self, known: set[str]) -> bool:
        return bool(self._alive() - known)

    def of(self, pid: int) -> JoinedNode | None:
        """Returns the node of a process."""
        for node in self.living:
            if node.has(pid):
                return node
        return None

    def lose(self, node: JoinedNode) -> None:
        """Kills a node."""
        if node in self.living:
            self.living.remove(node)
        node.kill()

    def close(self) -> None:
        """Kills all of them."""
        while self.living:
            self.lose(self.living[0])

    @property
    def sessions(self) -> list[Session]:
        """The sessions of their processes."""
        return [node.session for node in self.living]


class Striker:
    """Makes faults; `nodes` is None where the job runs on the stack's own node."""

    def __init__(
        self, road: Road, observer: Observer, storage: FaultyStorage, nodes: Nodes | None
    ) -> None:
        self._road = road
        self._observer = observer
        self._storage = storage
        self._nodes = nodes

    def strike(self, strike: Strike, job_id: str) -> list[str]:
        """Makes all faults of a strike, at once if they overlap; returns what was hit."""
        with ThreadPoolExecutor(len(strike.faults)) as threads:
            make = partial(self._make, job_id)
            hits = list(threads.map(make, strike.faults))
        if self._nodes is not None:
            self._nodes.refill()
        return hits

    def _make(self, job_id: str, fault: Fault) -> str:
        time.sleep(fault.pause_s)
        if fault.kind in OF_NODES:
            return self._hit_node(fault, job_id)
        match fault.kind:
            case FaultKind.RANK:
                kill(self._living(job_id, f"w{fault.rank}"))
            case FaultKind.DRIVER:
                kill(self._living(job_id, "driver"))
            case FaultKind.SERVICE:
                with service_away(self._road):
                    time.sleep(fault.seconds)
            case FaultKind.STORAGE_FAILS:
                self._storage.fail(fault.seconds)
            case FaultKind.WRITES_FAIL:
                self._storage.fail_writes(fault.seconds)
            case FaultKind.READS_FAIL:
                self._storage.fail_reads(fault.seconds)
            case FaultKind.DISK_FULL:
                self._storage.fill(fault.seconds)
            case FaultKind.STALL:
                self._storage.stall(fault.seconds)
        return str(fault)

    def _living(self, job_id: str, role: str) -> int:
        return int(until(f"a living {role}", lambda: self._role(job_id, role), _ALIVE_S))

    def _role(self, job_id: str, role: str) -> int | None:
        """Returns the pid of a role; of a rank that is being replaced, its successor's."""
        return self._observer.actors(job_id).get(role)

    def _hit_node(self, fault: Fault, job_id: str) -> str:
        nodes = self._nodes
        assert nodes is not None
        node = nodes.of(self._living(job_id, f"w{fault.rank}"))
        if node is None:
            # It died between the two questions.
            node = nodes.living[0]
        if fault.kind is FaultKind.NODE_KILLED:
            nodes.lose(node)
            return str(fault)
        node.freeze()
        time.sleep(fault.seconds)
        if fault.thaws:
            node.thaw()
        else:
            nodes.lose(node)
        return str(fault)
