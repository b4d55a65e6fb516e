"""Defines the bodies of the public API about clusters.

Owns: their fields and descriptions. Must not know: what an agent sends.
"""

from datetime import datetime
from typing import Literal

from pydantic import Field

from service.api.models import Body


# What a node reports, as `workers.protocol.wire.NodeInfo` carries it.
class Node(Body):
    """One node of a cluster."""

    node_id: str
    """Ray's id of the node."""
    address: str
    """IP address of the node."""
    alive: bool
    """Whether Ray reaches the node."""
    cpus: float
    """CPUs that Ray may use."""
    gpus: float
    """GPUs that Ray may use."""
    accelerator_type: str | None
    """Ray's name of the GPUs; null without GPUs."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources that Ray may use, by name."""
    memory_bytes: int
    """Memory that Ray may use."""
    labels: dict[str, str]
    """Ray's labels of the node."""
    storage_ok: bool | None
    """Whether the node can read the shared storage; null while it was not checked."""
    draining: bool
    """Whether the node is about to go; no rank starts there."""
    drain_deadline: datetime | None
    """When it goes; null if that is not known."""
    excluded: str | None
    """Why no rank may start there; null if the node is not excluded."""


class NodeExclusion(Body):
    """A node on which no rank may start."""

    node_id: str
    """Ray's id of the node."""
    address: str
    """IP address of the node."""
    reason: str
    """Why it was excluded."""
    since: datetime
    """When it was excluded."""
    by: str
    """Id of the job whose failure excluded it, or `admin`."""


class ExcludeRequest(Body):
    """A node to exclude."""

    node: str = Field(min_length=1, max_length=200)
    """Id of a living node, the first six or more characters of it, or its address."""
    reason: str = Field(default="excluded by hand", min_length=1, max_length=500)
    """Why, for other users."""


# What an admin lists, as `workers.protocol.wire.NodeGroup` carries it.
class NodeGroup(Body):
    """Nodes of one kind that an autoscaler may give to the cluster."""

    name: str
    """Name of the group: Ray's label `ray.io/node-group` of its nodes."""
    max_nodes: int
    """Largest number of these nodes at once; those that are there count."""
    cpus: float
    """CPUs of one node."""
    gpus: float
    """GPUs of one node."""
    accelerator_type: str | None
    """Ray's name of the GPUs; null without GPUs."""
    labels: dict[str, str]
    """Ray's labels of these nodes."""


class Driver(Body):
    """One job's driver."""

    job_id: str
    """Id of the job."""
    alive: bool
    """Whether its process runs."""
    detail: str
    """What the agent knows about its state."""


class Cluster(Body):
    """A Ray cluster as its agent last reported it."""

    object: Literal["cluster"] = "cluster"
    """Kind of this object."""
    name: str
    """Name of the cluster, as a spec refers to it."""
    live: bool
    """Whether the agent has been in contact recently."""
    agent_silence_s: float | None
    """Seconds since the agent's last request; null before its first one."""
    reported_at: datetime | None
    """When the agent last reported; null before its first report."""
    agent_id: str | None
    """Id of the agent's process."""
    code_version: str | None
    """Version of megatron-ray that the agent runs."""
    ray_version: str | None
    """Version of Ray that the agent runs."""
    namespace: str | None
    """Ray namespace of all actors of this service."""
    dashboard_url: str | None
    """URL of Ray's dashboard."""
    nodes: list[Node]
    """All nodes that the agent last reported."""
    excluded_nodes: list[NodeExclusion]
    """Nodes on which no rank may start, until they are removed from this list or gone."""
    node_groups: list[NodeGroup]
    """What the cluster may grow to; empty if it does not grow."""
    drivers: list[Driver]
    """The drivers of all jobs."""
    orphans: list[str]
    """Actors in the namespace that belong to no known job."""
