"""Plans on a Ray cluster of four nodes with eight GPUs each, which Ray only counts.

Placement groups, nodes and the choice of both are Ray's own. The short form asks one task
per rank where it is; the long form runs ranks that meet over gloo.
"""

import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.support.fake_service import NAMESPACE
from workers.decisions.placement import PlacementPlan, SlotFacts, plan_placement
from workers.decisions.rank_map import assign_ranks
from workers.decisions.topology.node_rules import NodeRules
from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo

pytestmark = pytest.mark.ray
NUM_STATES = 10
NODES = (
    ("H100", {"pool": "a", "ray.io/gpu-domain": "d0"}),
    ("H100", {"pool": "b", "ray.io/gpu-domain": "d0"}),
    ("H100", {"pool": "a", "ray.io/gpu-domain": "d1"}),
    ("A100", {"pool": "b", "ray.io/gpu-domain": "d1"}),
)


@pytest.fixture(scope="module")
def four_nodes() -> Iterator[str]:
    """Address of a cluster of four nodes beside its head; one node has another address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        import ray
        from ray.cluster_utils import Cluster

        folder = tempfile.mkdtemp(prefix="mr-", dir="/tmp")
        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "temp_dir": folder,
            "object_store_memory": 80 << 20,
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
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
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        cluster.wait_for_nodes()
        try:
            yield cluster.address
        finally:
            ray.shutdown()
            cluster.shutdown()  # type: ignore[no-untyped-call]
            shutil.rmtree(folder, ignore_errors=True)


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


def as_if_empty(nodes: Sequence[NodeInfo]) -> list[NodeInfo]:
    """Returns nodes that have no more than what is free now."""
    rest = []
    for node in nodes:
        free = node.free or {}
        update = {"gpus": free.get("GPU", 0.0), "cpus": free.get("CPU", 0.0)}
        rest.append(node.model_copy(update=update))
    return rest


def where_ranks_are(plan: PlacementPlan, group: Any) -> list[SlotFacts]:
    """Runs one task in the place of every worker, all at once."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from workers.ray.nodes import own_address

    @ray.remote(num_gpus=1, num_cpus=1)
    def tell(slot: int, bundle: int) -> dict[str, Any]:
        context = ray.get_runtime_context()
        # All of them hold their GPU until the last one has one.
        time.sleep(0.3)
        return {
            "slot": slot,
            "bundle": bundle,
            "node_id": context.get_node_id(),
            "address": own_address(),
            "pid": 1,
            "gpu": int(ray.get_gpu_ids()[0]),
        }

    calls = []
    for bundle in plan.bundles:
        place = PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=bundle.index
        )
        for slot in bundle.slots:
            calls.append(tell.options(scheduling_strategy=place).remote(slot, bundle.index))
    return [SlotFacts.model_validate(item) for item in ray.get(calls, timeout=60)]


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
            fits_now = plan_placement(asked, as_if_empty(nodes)).is_feasible
            handle = group.placement_group(plan)
            assert handle.wait(10 if fits_now else 0.5) == fits_now, (state, plan)
            if not fits_now:
                continue
            num_placed += 1
            facts = where_ranks_are(plan, handle)
            places = assign_ranks(facts, plan.dims, size=plan.bundle_size)
            rules = NodeRules.of(asked)
            allowed = {node.node_id for node in nodes if rules.allows(node)}
            assert {place.node_id for place in places} <= allowed
            for tensor_group in plan.dims.groups(["tp"]):
                assert len({places[rank].node_id for rank in tensor_group}) == 1
            devices = {(place.node_id, place.gpu) for place in places}
            assert len(devices) == len(places)
        finally:
            group.remove_placement_group()
            cluster.release()
    assert num_placed >= NUM_STATES // 2, "most of the states have room"


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
        assert handles[ready.index(False)].wait(10)
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
            assert group.placement_group(plan).wait(10)
            node_ids = group.nodes(plan).values()
            assert len({domain_of[node_id] for node_id in node_ids}) == num_domains
        finally:
            group.remove_placement_group()
            cluster.release()
