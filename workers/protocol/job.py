"""Defines the job spec, which users submit.

Owns: JobSpec, which is TrainConfig plus resources, network, pre-flight and restart rules.
Must not know: Ray, torch, HTTP.
"""

from typing import Self

from pydantic import Field, model_validator

from megatron_ray.config.base import Config
from megatron_ray.config.train_config import TrainConfig
from workers.protocol.network import NetworkConfig
from workers.protocol.preflight import PreflightConfig
from workers.protocol.resources import ResourceConfig

SPEC_VERSION = 1


class RestartConfig(Config):
    """Rules for restarting a job after a failure."""

    max_failures: int = Field(default=3, ge=0, le=1000)
    """Number of failed attempts that are restarted; the next one fails the job.
    Preemptions do not count."""
    max_preemptions: int = Field(default=-1, ge=-1, le=1 << 40)
    """Number of preempted attempts that are restarted; -1: no limit."""
    backoff_s: float = Field(default=1.0, ge=0, le=3600)
    """Seconds to wait before the second restart; doubled for each further one up to
    60 s, with jitter. The first restart is immediate, unless the storage was the cause."""
    hang_timeout_s: float | None = Field(default=None, ge=10, le=86400)
    """Seconds without a report of any rank, after the first step, before the attempt counts
    as hung: all stacks are taken, and it is restarted. It is raised to three times the
    longest pause between two reports so far, such as an evaluation. Default: 120 s, or ten
    times that pause. Ranks that wait for the storage have 10 minutes."""
    exclude_slow: bool = False
    """After a failure, exclude the nodes of ranks that were slower than their peers (event
    `rank.slow`), if the job fits on others. Other jobs avoid them too, until a user
    includes them again."""
    standby: bool = True
    """Keep one spare process per node, with all imports done, that replaces a dead rank
    at once. It uses about 300 MB of memory, no GPU and no CPU, and is started after the
    first checkpoint."""


class ElasticConfig(Config):
    """Range of data-parallel sizes at which a job may run.

    A job that loses ranks goes on with fewer replicas at once, and grows back at a
    checkpoint when the resources have returned and the time that it saves exceeds the cost
    several times. It grows up to `max_dp` into room that no other job needs, and returns it
    to jobs that wait in the queue. Global batch, order of the data and all other degrees
    stay, so losses equal those of an undisturbed run up to the order of summation. Under
    torchrun it has no effect.
    """

    min_dp: int = Field(ge=1, le=1 << 20)
    """Fewest replicas with which the job still trains; below, it waits for resources."""
    max_dp: int = Field(ge=1, le=1 << 20)
    """Most replicas, whether the job grows by itself or by a resize."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min_dp > self.max_dp:
            raise ValueError(
                f"min_dp={self.min_dp} is larger than max_dp={self.max_dp}; exchange them"
            )
        return self


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
    """Resources reserved for each rank, and the nodes that they are on."""
    network: NetworkConfig = NetworkConfig()
    """How ranks reach each other."""
    preflight: PreflightConfig = PreflightConfig()
    """Measurements of nodes and links before training."""
    restart: RestartConfig = RestartConfig()
    """Rules for restarting after a failure."""
    elastic: ElasticConfig | None = None
    """Data-parallel sizes at which the job may run; null: only at `parallel.dp`."""
    cluster: str = Field(default="default", min_length=1, max_length=64)
    """Name of the Ray cluster to run on, as given to its agent."""
    image: str = Field(default="default", min_length=1, max_length=64)
    """Name of a runtime image that an administrator has allowed. The job runs on nodes with
    the label `megatron-ray/image` of that value; `default`: on nodes without the label."""
    credentials: tuple[str, ...] = Field(default=(), max_length=64)
    """Names of secrets that an administrator has allowed and mounted on every node; never
    their values. Data and `checkpoint.start_from` are read with them. `storage.path` must
    then be a folder: an object store is written with the cluster's own credentials."""
    grace_s: float = Field(default=60.0, ge=0, le=3600)
    """Seconds that cancelling may take to finish the step and write a final checkpoint."""
