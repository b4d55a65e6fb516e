"""Plans on a Ray cluster of four nodes with eight GPUs each, which Ray only counts.

Placement groups, nodes and the choice of both are Ray's own; the long form also runs
ranks that meet over gloo.
"""

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_service import NAMESPACE
from tests.support.local_cluster import local_cluster
from workers.decisions.journal_entry import JournalEntry
from workers.decisions.placement import (
    PlacementPlan,
    RankPlace,
    SlotFacts,
    plan_placement,
)
from workers.decisions.rank_map import assign_ranks
from workers.decisions.slot_assignment import assign_slots
from workers.decisions.topology.node_rules import NodeRules
from workers.decisions.topology.room import Demand, FreeNode, max_islands, shape_of
from workers.driver.journal import start_orders
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo
from workers.rank.messages import Fence, Poll, RankState

pytestmark = pytest.mark.ray
NUM_STATES = 10
PLACED_S = 60
"""A starved machine takes long to show Ray what the state before has given back."""
NODES = (
    ("H100", {"pool": "a", "ray.io/gpu-domain": "d0"}),
    ("H100", {"pool": "b", "ray.io/gpu-domain": "d0"}),
    ("H100", {"pool": "a", "ray.io/gpu-domain": "d1"}),
    ("A100", {"pool": "b", "ray.io/gpu-domain": "d1"}),
)


@pytest.fixture(scope="module")
def four_nodes() -> Iterator[str]:
    """Address of a cluster of four nodes beside its head; one node has another address."""
    import ray

    with local_cluster() as cluster:
        _add_nodes(cluster)
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        cluster.wait_for_nodes()
        yield cluster.address


def _add_nodes(cluster: Any) -> None:
    for index, (gpu_type, labels) in enumerate(NODES):
        options: dict[str, Any] = {}
        if index == 1:
            options["node_ip_address"] = "127.0.0.2"
        cluster.add_node(
            wait=False,
            num_cpus=16,
            num_gpus=8,
            labels=labels,
            resources={f"accelerator_type:{gpu_type}": 1, "rdma": 8},
            object_store_memory=80 << 20,
            **options,
        )


def no_stop() -> None:
    """The wait for the workers is never ended early."""


def spec(parallel: dict[str, int], **resources: object) -> JobSpec:
    return JobSpec.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "parallel": parallel,
            "data": {"train": [{"path": "x"}]},
            "training": {"seq_length": 16, "global_batch_size": 48, "steps": 1},
            "optimizer": {"lr": 0.1},
            "resources": resources,
        }
    )


LAYOUTS = (
    {"tp": 2, "dp": 4},
    {"tp": 4, "dp": 2},
    {"tp": 2, "cp": 2, "dp": 2},
    {"tp": 1, "dp": 3, "pp": 2},
    {"tp": 8, "dp": 1},
    {"tp": 4, "pp": 2, "dp": 1},
)
CHOICES: tuple[dict[str, object], ...] = (
    {},
    {},
    {"gpu_type": "h100"},
    {"nodes": {"exclude": ["pool=a"]}},
    {"nodes": {"only": ["pool=a", "127.0.0.2"]}},
    {"nodes": {"exclude": ["127.0.0.2"]}, "custom": {"rdma": 1}},
)


class Cluster:
    """The nodes of the cluster, of which some GPUs are in use."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._held: list[Any] = []

    def occupy(self) -> tuple[NodeInfo, ...]:
        """Takes a random number of GPUs of each node; returns what is free then."""
        import ray

        from workers.decisions.topology.node_rules import NODE_ID_LABEL

        taken = {}
        for node in self.nodes():
            if node.gpus:
                taken[node.node_id] = self._random.choice((0, 0, 1, 3, 5, 7))
        for node_id, gpus in taken.items():
            if gpus:
                selector = [{NODE_ID_LABEL: node_id}]
                group = ray.util.placement_group(
                    [{"GPU": gpus}], bundle_label_selector=selector
                )
                assert group.wait(20)
                self._held.append(group)
        return self.settle({node_id: 8.0 - gpus for node_id, gpus in taken.items()})

    def settle(self, free_gpus: dict[str, float]) -> tuple[NodeInfo, ...]:
        """Waits until Ray shows what is free."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            nodes = self.nodes()
            shown = {node.node_id: (node.free or {}).get("GPU", 0.0) for node in nodes}
            if all(shown[node_id] == gpus for node_id, gpus in free_gpus.items()):
                return nodes
            time.sleep(0.05)
        raise AssertionError(f"Ray still shows {shown}, not {free_gpus}")

    def nodes(self) -> tuple[NodeInfo, ...]:
        from workers.ray.nodes import read_free_nodes

        return read_free_nodes()

    def release(self) -> None:
        """Gives back everything and waits until Ray shows it."""
        import ray

        for group in self._held:
            ray.util.remove_placement_group(group)
        self.settle({node.node_id: 8.0 for node in self.nodes() if node.gpus})


def fits_now(asked: JobSpec, nodes: Sequence[NodeInfo], plan: PlacementPlan) -> bool:
    """Returns whether the islands of a plan find room in what is free.

    They lie as on the empty cluster: in a domain only where no node is large enough.
    """
    rules = NodeRules.of(asked)
    usable = [node for node in nodes if rules.allows(node)]
    demand = Demand(plan.worker_resources, plan.dims.tp, NodeRules(gpu_type=rules.gpu_type))
    free = [FreeNode(node, dict(node.free or {})) for node in usable]
    islands = max_islands(free, demand, shape_of(usable, demand))
    return islands * plan.dims.tp >= plan.dims.world_size


def where_ranks_are(
    plan: PlacementPlan, nodes: Sequence[NodeInfo], node_of: dict[int, str]
) -> list[SlotFacts]:
    """Returns what the workers in the placed bundles would report."""
    addresses = {node.node_id: node.address for node in nodes}
    next_gpu = Counter[str]()
    facts = []
    for bundle in plan.bundles:
        node_id = node_of[bundle.index]
        for slot in bundle.slots:
            facts.append(
                SlotFacts(
                    slot=slot,
                    bundle=bundle.index,
                    node_id=node_id,
                    address=addresses[node_id],
                    pid=1,
                    gpu=next_gpu[node_id],
                )
            )
            next_gpu[node_id] += 1
    return facts


def check_places(
    asked: JobSpec,
    nodes: Sequence[NodeInfo],
    plan: PlacementPlan,
    places: Sequence[RankPlace],
) -> None:
    """Checks what must hold of every rank map."""
    rules = NodeRules.of(asked)
    allowed = {node.node_id for node in nodes if rules.allows(node)}
    assert {place.node_id for place in places} <= allowed
    for tensor_group in plan.dims.groups(["tp"]):
        assert len({places[rank].node_id for rank in tensor_group}) == 1
    devices = {(place.node_id, place.gpu) for place in places}
    assert len(devices) == len(places) == plan.dims.world_size


def test_no_tensor_parallel_group_straddles_nodes_in_any_state(four_nodes: str) -> None:
    from workers.ray.worker_group import WorkerGroup

    num_placed = 0
    for state in range(NUM_STATES):
        draw = random.Random(100 + state)
        cluster = Cluster(state)
        asked = spec(draw.choice(LAYOUTS), **draw.choice(CHOICES))
        group = WorkerGroup(f"job-state-{state}", NAMESPACE, object)
        try:
            nodes = cluster.occupy()
            plan = plan_placement(asked, nodes)
            # What Ray grants is what the planner counts, in use as well as empty.
            has_room = fits_now(asked, nodes, plan)
            wait_s = 0.5
            if has_room:
                wait_s = PLACED_S
            assert group.placement_group(plan).wait(wait_s) == has_room, (state, plan)
            if not has_room:
                continue
            num_placed += 1
            facts = where_ranks_are(plan, nodes, group.nodes(plan))
            places = assign_ranks(facts, plan.dims, size=plan.bundle_size)
            check_places(asked, nodes, plan, places)
        finally:
            group.remove_placement_group()
            cluster.release()
    assert num_placed >= NUM_STATES // 2, "most of the states have room"


@pytest.mark.chaos
@pytest.mark.parametrize("state", range(NUM_STATES))
def test_ranks_of_any_state_meet_over_gloo(
    four_nodes: str, state: int, tmp_path: Path
) -> None:
    from tests.support.fake_job import FakeWorker
    from workers.ray.worker_group import WorkerGroup

    draw = random.Random(200 + state)
    cluster = Cluster(state)
    asked = spec(draw.choice(LAYOUTS))
    group = WorkerGroup(f"job-ranks-{state}", NAMESPACE, FakeWorker)
    fence = Fence(1, 1)
    num_slots = 0
    try:
        nodes = cluster.occupy()
        plan = plan_placement(asked, nodes)
        if not fits_now(asked, nodes, plan):
            pytest.skip("this state has no room")
        assert group.placement_group(plan).wait(PLACED_S)
        num_slots = plan.dims.world_size
        assignment = assign_slots(plan, (), (), (), group.nodes(plan))
        group.create(plan, assignment.workers_to_start, 1)
        facts = group.probe(assignment.slots, fence, 180, no_stop)
        places = assign_ranks(facts, plan.dims, size=plan.bundle_size)
        check_places(asked, nodes, plan, places)
        store = None
        if num_slots > 1:
            store = group.open_store(places[0].slot, fence, 180, no_stop)
        entry = JournalEntry(
            job_id=f"job-ranks-{state}",
            attempt=1,
            spec={
                **asked.model_dump(mode="json"),
                "storage": {"path": str(tmp_path)},
            },
            prepared={},
            ranks=places,
            store=store,
        )
        # On CPU: the GPUs are in Ray's books only.
        group.start(fence, start_orders(entry, "cpu"), 60, no_stop)
        states: dict[int, RankState] = {}
        deadline = time.monotonic() + 180
        while len(states) < num_slots and time.monotonic() < deadline:
            for place in places:
                if place.rank not in states:
                    group.poll(place.slot, place.rank, fence, Poll(None, wait_s=1.0))
            for answer in group.collect(5.0):
                assert answer.reply is not None, answer.death
                assert answer.reply.error is None, answer.reply.error
                if answer.reply.state.is_over:
                    states[answer.rank] = answer.reply.state
        assert set(states.values()) == {RankState.FINISHED}
    finally:
        group.remove_all(num_slots)
        cluster.release()


def test_two_jobs_that_do_not_fit_together_never_deadlock(four_nodes: str) -> None:
    from workers.ray.worker_group import WorkerGroup

    cluster = Cluster(0)
    # 24 of 32 GPUs each.
    plans = [plan_placement(spec({"tp": 8, "dp": 3}), cluster.nodes()) for _ in range(2)]
    for round_number in range(3):
        groups = []
        for number in range(2):
            groups.append(WorkerGroup(f"job-{round_number}-{number}", NAMESPACE, object))
        # Requested at the same time.
        handles = []
        for group, plan in zip(groups, plans, strict=True):
            handles.append(group.placement_group(plan))
        ready = [handle.wait(2) for handle in handles]
        assert sorted(ready) == [False, True], "one has everything, the other nothing"
        groups[ready.index(True)].remove_placement_group()
        assert handles[ready.index(False)].wait(PLACED_S)
        groups[ready.index(False)].remove_placement_group()
        cluster.release()


def test_an_island_larger_than_a_node_lies_in_a_domain(four_nodes: str) -> None:
    from workers.ray.worker_group import WorkerGroup

    cluster = Cluster(0)
    nodes = cluster.nodes()
    plan = plan_placement(spec({"tp": 16, "dp": 1}), nodes)
    assert (plan.bundle_size, plan.domain_label) == (8, "ray.io/gpu-domain")
    group = WorkerGroup("job-domain", NAMESPACE, object)
    domain_of = {node.node_id: node.labels.get("ray.io/gpu-domain") for node in nodes}
    for layout, num_domains in (({"tp": 16, "dp": 1}, 1), ({"tp": 16, "dp": 2}, 2)):
        plan = plan_placement(spec(layout), cluster.nodes())
        try:
            assert group.placement_group(plan).wait(PLACED_S)
            node_ids = group.nodes(plan).values()
            assert len({domain_of[node_id] for node_id in node_ids}) == num_domains
        finally:
            group.remove_placement_group()
            cluster.release()
