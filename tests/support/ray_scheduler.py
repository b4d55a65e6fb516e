"""A model of Ray's scheduler: where it may put the bundles of a plan.

Owns: what Ray guarantees and nothing more. The order of nodes is drawn by chance, as
Ray's looks to its callers.
"""

import random
from collections.abc import Mapping, Sequence

from workers.decisions.placement import PlacementPlan, SlotFacts
from workers.decisions.topology.node_rules import NODE_ID_LABEL
from workers.protocol.wire import NodeInfo


def meets(node: NodeInfo, selector: Mapping[str, str]) -> bool:
    """Whether a node meets Ray's conditions; a label that is absent is in no list."""
    labels = {**node.labels, NODE_ID_LABEL: node.node_id}
    for key, condition in selector.items():
        is_denied = condition.startswith("!")
        values = (
            condition.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
        )
        if (labels.get(key) in values) == is_denied:
            return False
    return True


class RayScheduler:
    """Nodes with free resources, on which placement groups are placed whole or not at all."""

    def __init__(self, nodes: Sequence[NodeInfo], seed: int) -> None:
        self._nodes = [node for node in nodes if node.alive]
        self._random = random.Random(seed)
        self._free: dict[str, dict[str, float]] = {}
        self._gpus: dict[str, list[int]] = {}
        for node in self._nodes:
            gpus = list(range(int(node.gpus)))
            resources = {"CPU": node.cpus, "GPU": node.gpus, **node.resources}
            free = dict(resources if node.free is None else node.free)
            self._free[node.node_id] = free
            self._gpus[node.node_id] = gpus[int(node.gpus - free.get("GPU", 0)) :]

    def place(self, plan: PlacementPlan) -> list[SlotFacts] | None:
        """Returns where the workers of a plan run; None, and nothing is held, if it waits."""
        domains: set[str | None] = {None}
        if plan.domain_label is not None:
            domains = {node.labels.get(plan.domain_label) for node in self._nodes} - {None}
        for domain in sorted(domains, key=str):
            chosen = self._choose(plan, domain)
            if chosen is not None:
                return self._workers(plan, chosen)
        return None

    def _choose(self, plan: PlacementPlan, domain: str | None) -> list[NodeInfo] | None:
        before = {node_id: dict(free) for node_id, free in self._free.items()}
        nodes = list(self._nodes)
        self._random.shuffle(nodes)
        chosen = []
        for bundle in plan.bundles:
            for node in nodes:
                free = self._free[node.node_id]
                is_in = domain is None or node.labels.get(plan.domain_label or "") == domain
                has_room = all(
                    free.get(name, 0.0) >= amount - 1e-6
                    for name, amount in bundle.resources.items()
                )
                if is_in and has_room and meets(node, bundle.selector):
                    for name, amount in bundle.resources.items():
                        free[name] -= amount
                    chosen.append(node)
                    break
            else:
                self._free = before
                return None
        return chosen

    def _workers(self, plan: PlacementPlan, chosen: Sequence[NodeInfo]) -> list[SlotFacts]:
        facts = []
        for bundle, node in zip(plan.bundles, chosen, strict=True):
            for slot in bundle.slots:
                gpu = None
                if plan.accelerator == "gpu":
                    gpu = self._gpus[node.node_id].pop(0)
                facts.append(
                    SlotFacts(
                        slot=slot,
                        bundle=bundle.index,
                        node_id=node.node_id,
                        address=node.address,
                        pid=1000 + slot,
                        gpu=gpu,
                        domain=node.labels.get("ray.io/gpu-domain", ""),
                    )
                )
        self._random.shuffle(facts)
        return facts
