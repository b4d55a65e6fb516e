"""Defines the resources of a job, and the nodes that it may use.

Owns: what a spec may require of nodes. Must not know: Ray, which nodes there are.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from megatron_ray.config.base import Config

_RESERVED = ("cpu", "gpu", "memory", "object_store_memory", "bundle")
"""Resources that Ray counts itself."""
# Kubernetes' syntax of labels, which Ray requires of its own.
_LABEL_NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(rf"({_LABEL_NAME}/)?{_LABEL_NAME}={_LABEL_NAME}")
_ADDRESS = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:_-]*")


def _check_node_pattern(pattern: str) -> str:
    if not _LABEL.fullmatch(pattern) and not _ADDRESS.fullmatch(pattern):
        raise PydanticCustomError(
            "node_pattern", "must be a node's address, or a label such as pool=h100"
        )
    return pattern


def _check_resource_name(name: str) -> str:
    if name.lower() in _RESERVED:
        raise PydanticCustomError(
            "reserved_resource",
            "is counted by Ray itself; use cpus_per_rank, accelerator or gpu_type for it",
        )
    return name


NodePattern = Annotated[str, Field(max_length=320), AfterValidator(_check_node_pattern)]
ResourceName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$"),
    AfterValidator(_check_resource_name),
]
ResourceAmount = Annotated[float, Field(ge=0.0001, le=1 << 20)]


class NodeSelection(Config):
    """Nodes that a job may use.

    An item names nodes by address, such as `10.0.0.7`, by Ray's node id, or by label,
    such as `pool=h100`.
    """

    only: tuple[NodePattern, ...] = Field(default=(), max_length=1024)
    """The nodes to use: those that any of the items names. Default: all."""
    exclude: tuple[NodePattern, ...] = Field(default=(), max_length=1024)
    """Nodes to leave out, also of those in `only`."""


class ResourceConfig(Config):
    """Resources reserved for each rank, and the nodes that they are on."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """`gpu`: one GPU per rank; `cpu`: no GPU; `auto`: `gpu` if gpu_type is given or a node
    that the job may use has a GPU, else `cpu`."""
    gpu_type: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Type of the GPUs, such as `H100` or `A100-80G`, as Ray names it. Default: any."""
    cpus_per_rank: float = Field(default=1.0, ge=0.0001, le=1024)
    """CPU cores reserved for each rank; on CPU also its number of torch threads. Ray
    counts in steps of 0.0001."""
    custom: dict[ResourceName, ResourceAmount] = Field(default_factory=dict, max_length=32)
    """Custom resources of Ray that are reserved for each rank: amounts by name, such as
    `{rdma: 1}`. A node has those of `ray start --resources`."""
    nodes: NodeSelection = NodeSelection()
    """Nodes that the job may use. Default: all."""
    placement_timeout_s: float = Field(default=300.0, gt=0, le=86400 * 7)
    """Seconds to wait for the placement group before the job returns to the queue."""

    @property
    def num_threads(self) -> int:
        """Number of torch threads of a rank: its whole cores, at least one."""
        return max(1, int(self.cpus_per_rank))

    @model_validator(mode="after")
    def _check_gpu_type(self) -> Self:
        if self.gpu_type is not None and self.accelerator == "cpu":
            raise PydanticCustomError(
                "gpu_type",
                "resources.gpu_type={gpu_type} contradicts accelerator=cpu; remove one of them",
                {"gpu_type": self.gpu_type},
            )
        return self
