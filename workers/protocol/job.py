"""Defines the job spec, which users submit.

Owns: JobSpec, which is TrainConfig plus resources and restart rules. Must not know: Ray,
torch, HTTP.
"""

from typing import Literal

from pydantic import Field

from megatron_ray.config.base import Config
from megatron_ray.config.train_config import TrainConfig

SPEC_VERSION = 1


class ResourceConfig(Config):
    """Resources reserved for each rank."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """`gpu`: one GPU per rank; `cpu`: no GPU; `auto`: `gpu` if the cluster has any GPU,
    else `cpu`."""
    cpus_per_rank: float = Field(default=1.0, ge=0.0001, le=1024)
    """CPU cores reserved for each rank; on CPU also its number of torch threads. Ray
    counts in steps of 0.0001."""
    placement_timeout_s: float = Field(default=300.0, gt=0, le=86400 * 7)
    """Seconds to wait for the placement group before the job returns to the queue."""

    @property
    def num_threads(self) -> int:
        """Number of torch threads of a rank: its whole cores, at least one."""
        return max(1, int(self.cpus_per_rank))


class RestartConfig(Config):
    """Rules for restarting a job after a failure."""

    max_failures: int = Field(default=3, ge=0, le=1000)
    """Number of failed attempts that are restarted; the next one fails the job.
    Preemptions do not count."""
    max_preemptions: int = Field(default=-1, ge=-1, le=1 << 40)
    """Number of preempted attempts that are restarted; -1: no limit."""
    backoff_s: float = Field(default=1.0, ge=0, le=3600)
    """Seconds to wait before the second restart; doubled for each further one up to
    60 s, with jitter. The first restart is immediate."""
    hang_timeout_s: float | None = Field(default=None, ge=10, le=86400)
    """Seconds without a report of any rank, after the first step, before the attempt counts
    as hung: all stacks are taken, and it is restarted. It is raised to three times the
    longest pause between two reports so far, such as an evaluation. Default: 120 s, or ten
    times that pause."""
    exclude_slow: bool = False
    """After a failure, exclude the nodes of ranks that were slower than their peers (event
    `rank.slow`), if the job fits on others. Other jobs avoid them too, until a user
    includes them again."""
    standby: bool = True
    """Keep one spare process per node, with all imports done, that replaces a dead rank
    at once. It uses about 300 MB of memory, no GPU and no CPU, and is started after the
    first checkpoint."""


class JobSpec(TrainConfig):
    """A training run with the fields that the service needs to schedule and restart it."""

    spec_version: int = Field(default=SPEC_VERSION, ge=1, le=SPEC_VERSION)
    """Version of this format; newer versions than the service knows are refused."""
    name: str = Field(default="job", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Display name: lower-case letters, digits and dashes, at most 63. Need not be unique;
    job ids are."""
    metadata: dict[str, str] = Field(default_factory=dict, max_length=64)
    """Free labels for filtering."""
    priority: int = Field(default=0, ge=-1000, le=1000)
    """Queue priority; jobs with a higher number are scheduled first."""
    resources: ResourceConfig = ResourceConfig()
    """Resources reserved for each rank."""
    restart: RestartConfig = RestartConfig()
    """Rules for restarting after a failure."""
    cluster: str = Field(default="default", min_length=1, max_length=64)
    """Name of the Ray cluster to run on, as given to its agent."""
    image: str = Field(default="default", min_length=1, max_length=64)
    """Name of a runtime image that an administrator has allowed."""
    credentials: tuple[str, ...] = Field(default=(), max_length=64)
    """Names of mounted secrets that an administrator has allowed; never their values."""
    grace_s: float = Field(default=60.0, ge=0, le=3600)
    """Seconds that cancelling may take to finish the step and write a final checkpoint."""
