"""Decides which nodes a job may use, and the conditions that Ray gets.

Owns: the reasons for which a node is left out, and the label selector of a bundle. Pure.
Must not know: Ray, how much fits on a node.
"""

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from workers.protocol.job import JobSpec
from workers.protocol.wire import NodeInfo

NODE_ID_LABEL = "ray.io/node-id"
ACCELERATOR_LABEL = "ray.io/accelerator-type"
ACCELERATOR_PREFIX = "accelerator_type:"
"""Ray's resource of which a node with such an accelerator has 1."""
DOMAIN_LABELS = ("ray.io/gpu-domain", "nvidia.com/gpu.clique")
"""Node labels that name an NVLink domain larger than a node."""
IMAGE_LABEL = "megatron-ray/image"
"""Node label that names the image which the node runs."""
DEFAULT_IMAGE = "default"
"""The image of a node without that label."""
_NO_NODE = "none"
"""A node id that no node has."""


@dataclass(frozen=True)
class NodeRules:
    """What a job requires of its nodes."""

    gpu_type: str | None = None
    only: tuple[str, ...] = ()
    """Patterns: an address, a node id, or `label=value`."""
    exclude: tuple[str, ...] = ()
    avoid: Mapping[str, str] = field(default_factory=dict)
    """Why nodes must not be used, by node id."""
    image: str | None = None
    """Name of the image that nodes must run; None: any."""

    @cached_property
    def _chosen(self) -> frozenset[str]:
        return frozenset(map(_canonical, self.only))

    @cached_property
    def _excluded(self) -> frozenset[str]:
        return frozenset(map(_canonical, self.exclude))

    @classmethod
    def of(cls, spec: JobSpec, avoid: Mapping[str, str] | None = None) -> Self:
        """Returns the rules of a spec; `avoid` are other reasons, by node id."""
        resources = spec.resources
        nodes = resources.nodes
        return cls(resources.gpu_type, nodes.only, nodes.exclude, avoid or {}, spec.image)

    def refusal(self, node: NodeInfo) -> str | None:
        """Returns why a living node must not be used; None if it may."""
        if node.storage_ok is False:
            return "it cannot read the job storage"
        if node.draining:
            return "it is being drained"
        if node.excluded is not None:
            return node.excluded
        if node.node_id in self.avoid:
            return self.avoid[node.node_id]
        if self.exclude and not _names_of(node).isdisjoint(self._excluded):
            return "resources.nodes.exclude names it"
        if self.only and _names_of(node).isdisjoint(self._chosen):
            return "resources.nodes.only does not name it"
        if self.gpu_type is not None and not _has_type(node, self.gpu_type):
            return f"it has {node.accelerator_type or 'no GPU'}, not {self.gpu_type}"
        if self.image not in (None, _image_of(node)):
            return f"it runs image {_image_of(node)}, not {self.image}"
        return None

    def allows(self, node: NodeInfo) -> bool:
        """Whether ranks may run on a node: it is alive, and nothing speaks against it."""
        return node.alive and self.refusal(node) is None

    def allowed(self, nodes: Iterable[NodeInfo]) -> list[NodeInfo]:
        """Returns the nodes that ranks may run on."""
        return [node for node in nodes if self.allows(node)]


def is_usable(node: NodeInfo) -> bool:
    """Whether a node may run any ranks: it is alive, and nothing keeps them away."""
    return NodeRules().allows(node)


def has_gpus(nodes: Iterable[NodeInfo]) -> bool:
    """Whether any of the nodes has a GPU."""
    for node in nodes:
        if node.gpus >= 1:
            return True
    return False


def label_selector(nodes: Sequence[NodeInfo], rules: NodeRules) -> dict[str, str]:
    """Returns Ray's conditions for a bundle's node, by label; none where any node will do.

    Of GPU types only those that nodes carry as a label, see `type_resources`.
    """
    usable = rules.allowed(nodes)
    selector = _chosen_nodes(usable, rules)
    # The ids of the usable nodes imply every other condition.
    if NODE_ID_LABEL not in selector:
        selector = _without_excluded(selector, nodes, rules)
    if rules.gpu_type is not None and not type_resources(usable, rules):
        selector[ACCELERATOR_LABEL] = _type_name(usable, rules.gpu_type)
    return selector | _image_condition(nodes, rules)


def type_resources(usable: Sequence[NodeInfo], rules: NodeRules) -> dict[str, float]:
    """Returns the resource by which a bundle gets a node with the right GPUs."""
    if rules.gpu_type is None:
        return {}
    name = ACCELERATOR_PREFIX + _type_name(usable, rules.gpu_type)
    # Some nodes carry their type as a label only.
    for node in usable:
        if name not in node.resources:
            return {}
    # Of the 1 that a node has, so little that any number of bundles finds some.
    return {name: 0.001}


def domain_label(nodes: Iterable[NodeInfo]) -> str | None:
    """Returns the label that names the nodes' NVLink domains; None if none has one."""
    carried = set[str]()
    for node in nodes:
        carried.update(node.labels)
    for label in DOMAIN_LABELS:
        if label in carried:
            return label
    return None


def id_of(node: NodeInfo) -> str:
    """Returns a node's id."""
    return node.node_id


def address_key(address: str) -> tuple[object, ...]:
    """Returns a key that sorts addresses by number: 10.0.0.9 comes before 10.0.0.10."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        # A host name, after all addresses.
        return 9, 0, address
    return parsed.version, int(parsed), address


def _chosen_nodes(usable: Sequence[NodeInfo], rules: NodeRules) -> dict[str, str]:
    """Returns the condition that `rules.only` makes."""
    if not rules.only:
        return {}
    values: dict[str, list[str]] = {}
    for pattern in rules.only:
        key, _, value = pattern.partition("=")
        values.setdefault(key, []).append(value)
    (key, *others) = values
    # A selector has one condition per label, and all must hold; so nodes with either of
    # two labels, or with an address, can only be named one by one.
    if others or "" in values[key]:
        return {NODE_ID_LABEL: _condition("in", list(map(id_of, usable)))}
    chosen = []
    excluded = _excluded_labels(rules).get(key, ())
    for value in values[key]:
        if value not in excluded:
            chosen.append(value)
    return {key: _condition("in", chosen)}


def _without_excluded(
    selector: Mapping[str, str], nodes: Sequence[NodeInfo], rules: NodeRules
) -> dict[str, str]:
    """Returns the selector with conditions that leave excluded nodes out."""
    combined = dict(selector)
    labels = _excluded_labels(rules)
    for key, values in labels.items():
        combined.setdefault(key, _condition("!in", values))
    # Nodes that have no label of their own are named.
    others = NodeRules(exclude=_addresses(rules), avoid=rules.avoid)
    excluded = []
    for node in nodes:
        if node.alive and others.refusal(node) is not None:
            excluded.append(node.node_id)
    if excluded:
        combined[NODE_ID_LABEL] = _condition("!in", excluded)
    return combined


def _image_condition(nodes: Sequence[NodeInfo], rules: NodeRules) -> dict[str, str]:
    """Returns the condition for the image that a node runs; none where all run it."""
    if rules.image is None:
        return {}
    if rules.image != DEFAULT_IMAGE:
        return {IMAGE_LABEL: rules.image}
    others = set(map(_image_of, nodes)) - {DEFAULT_IMAGE}
    if not others:
        return {}
    # Most nodes carry no such label at all, which this condition allows.
    return {IMAGE_LABEL: _condition("!in", sorted(others))}


def _image_of(node: NodeInfo) -> str:
    return node.labels.get(IMAGE_LABEL, DEFAULT_IMAGE)


def _excluded_labels(rules: NodeRules) -> dict[str, list[str]]:
    labels: dict[str, list[str]] = {}
    for pattern in rules.exclude:
        key, equals, value = pattern.partition("=")
        if equals:
            labels.setdefault(key, []).append(value)
    return labels


def _addresses(rules: NodeRules) -> tuple[str, ...]:
    addresses = []
    for pattern in rules.exclude:
        if "=" not in pattern:
            addresses.append(pattern)
    return tuple(addresses)


def _condition(operator: str, values: Sequence[str]) -> str:
    return f"{operator}({','.join(values or [_NO_NODE])})"


def _names_of(node: NodeInfo) -> set[str]:
    """Returns every pattern that names a node."""
    names = {f"{key}={value}" for key, value in node.labels.items()}
    return names | {node.node_id, _canonical(node.address)}


def _canonical(pattern: str) -> str:
    """Returns a pattern so that two spellings of an address are equal."""
    try:
        return str(ipaddress.ip_address(pattern))
    except ValueError:
        return pattern


def _has_type(node: NodeInfo, gpu_type: str) -> bool:
    name = node.accelerator_type
    return name is not None and name.lower() == gpu_type.lower()


def _type_name(usable: Sequence[NodeInfo], gpu_type: str) -> str:
    """Returns the type as Ray spells it."""
    for node in usable:
        if node.accelerator_type is not None:
            return node.accelerator_type
    return gpu_type
