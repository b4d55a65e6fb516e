"""What a user submits.

Owns: JobSpec = TrainConfig + resources + restart. Must not know: Ray, torch, HTTP.
"""

from typing import Literal

from pydantic import Field

from megatron_ray.config.base import Config
from megatron_ray.config.train_config import TrainConfig

SPEC_VERSION = 1


class ResourceConfig(Config):
    """What one rank needs."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """`gpu`: one GPU per rank; `cpu`: none; `auto`: GPUs where the cluster has any."""
    cpus_per_rank: float = Field(default=1.0, gt=0, le=1024)
    """CPU cores reserved for each rank (and its torch threads on CPU)."""
    placement_timeout_s: float = Field(default=300.0, gt=0, le=86400 * 7)
    """How long to wait for the placement group before the job goes back to the
    queue."""

    @property
    def num_threads(self) -> int:
        """Torch threads of a rank: its whole cores, at least one."""
        return max(1, int(self.cpus_per_rank))


class RestartConfig(Config):
    """When to try again."""

    max_failures: int = Field(default=3, ge=0, le=1000)
    """Attempts that may fail before the job does; preemptions are not counted."""
    max_preemptions: int = Field(default=-1, ge=-1)
    """Attempts that may be preempted; -1: any number."""
    backoff_s: float = Field(default=1.0, ge=0, le=3600)
    """Wait before the second try; doubles each time up to 60 s, with jitter; the first
    try is immediate."""
    standby: bool = True
    """Keep one process per node that has imported everything and waits: it takes a dead
    rank's place at once. It uses some 300 MB of memory, no GPU and no CPU, from the
    first checkpoint on."""


class JobSpec(TrainConfig):
    """A training run plus what the service needs to place it and keep it alive."""

    spec_version: int = Field(default=SPEC_VERSION, ge=1, le=SPEC_VERSION)
    """Version of this format; a reader refuses newer ones."""
    name: str = Field(default="job", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Name for people; lower case, digits and dashes. Not unique: ids are."""
    metadata: dict[str, str] = Field(default_factory=dict, max_length=64)
    """Free labels, for filtering."""
    priority: int = Field(default=0, ge=-1000, le=1000)
    """Higher goes first in the queue."""
    resources: ResourceConfig = ResourceConfig()
    """What one rank needs."""
    restart: RestartConfig = RestartConfig()
    """When to try again."""
    cluster: str = Field(default="default", min_length=1, max_length=64)
    """Which Ray cluster, by the name its agent goes by."""
    image: str = Field(default="default", min_length=1, max_length=64)
    """Name of a runtime an admin has allowed."""
    credentials: tuple[str, ...] = ()
    """Names of mounted secrets an admin has allowed; never their values."""
    grace_s: float = Field(default=60.0, ge=0, le=3600)
    """How long cancelling may take to finish the step and write a last checkpoint."""
