"""Defines replica groups that train by themselves and synchronize every few steps.

Owns: what is due after which step, and which parameters are due together. Must not know:
ranks, tensors.
"""

from typing import Annotated, Any

from pydantic import Field, field_validator

from megatron_ray.config.base import Config, read_number

_LAYERS = ("layers", "mtp")
_BEFORE_LAYERS = ("embedding", "embedding_norm", "position_embedding")

Period = Annotated[int, Field(ge=1, le=1 << 40)]


class OuterOptimizerConfig(Config):
    """SGD on what the groups have moved since they last synchronized (DiLoCo).

    Its gradient is the weights after the last synchronization minus the mean of the
    groups' weights now. With lr=1 and momentum=0 the new weights are the mean.
    """

    lr: float = Field(default=0.7, gt=0, le=10)
    """Learning rate, constant over the run."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Factor on the previous outer update; 0 keeps none."""
    nesterov: bool = True
    """Whether momentum looks ahead (Nesterov)."""


class RendezvousConfig(Config):
    """Where the groups of a run meet when each of them is a job of its own.

    The jobs have the same spec but for `group`, `storage.path` and where they run; every
    field but `groups` is about one job.
    """

    path: str = Field(min_length=1, max_length=4096)
    """Folder or URI (`s3://`, `gs://`) that every job can read and write. Each keeps one
    small file there, which has its address and is renewed every few seconds."""
    group: int = Field(ge=0, le=1 << 20)
    """Number of the group that this job is, from 0 to groups - 1. It has its own part of
    the samples."""
    lost_after_s: float = Field(default=20.0, ge=1, le=3600)
    """Seconds without a sign of another job after which the rest goes on without it. A job
    that ends is noticed at once."""
    start_timeout_s: float = Field(default=600.0, ge=0, le=86400)
    """Seconds for which jobs wait for the others as long as none of them trains. Later ones
    join the others when these synchronize, and continue from their state."""


class LocalSGDConfig(Config):
    """Replica groups that update by themselves and average their weights now and then.

    Local SGD averages weights (Stich 2019); DiLoCo gives the mean to an outer optimizer
    (Douillard et al. 2023); DES-LOC averages moments too, each with its own period (Iacob
    et al. 2025). Gradients are reduced, clipped and applied within a group.
    """

    groups: int = Field(ge=2, le=1 << 20)
    """Number of groups; each has dp / groups replicas, neighbours along dp."""
    sync_every: Period
    """Steps between two synchronizations of the weights. They are synchronized after the
    last step of the run, too."""
    sync_moments_every: dict[str, Period] = Field(default_factory=dict, max_length=16)
    """Steps between averages of the optimizer's moments by name, such as
    `{exp_avg: 96, exp_avg_sq: 192}`. Others stay as they are in each group. Default: all
    of them stay."""
    outer_optimizer: OuterOptimizerConfig | None = None
    """Optimizer of the synchronization. Each rank needs memory for one more copy of the
    parameters that it updates, and with momentum for two. Default: groups continue from
    their mean."""
    fragments: int = Field(default=1, ge=1, le=1024)
    """Parts of the model that are synchronized at different steps, spread evenly over the
    period: layer n is in fragment n modulo their number, embeddings in the first, final
    norm and head in the last. More of them send less at once, and as much in all."""
    rendezvous: RendezvousConfig | None = None
    """Makes each group a job of its own, which trains on while others are lost: `dp` and
    the batch are those of one job. Default: all groups are in one job."""

    @property
    def groups_in_job(self) -> int:
        """Groups that this job has."""
        if self.rendezvous is None:
            return self.groups
        return 1

    @property
    def jobs(self) -> int:
        """Jobs that train together, each on its own part of the samples."""
        return self.groups // self.groups_in_job

    @property
    def job_index(self) -> int:
        """This job's index among them."""
        if self.rendezvous is None:
            return 0
        return self.rendezvous.group

    @property
    def outer_copies(self) -> int:
        """Copies of the parameters that the outer optimizer keeps."""
        if self.outer_optimizer is None:
            return 0
        return 1 + (self.outer_optimizer.momentum > 0)

    @field_validator("sync_moments_every", mode="before")
    @classmethod
    def _read_periods(cls, periods: Any) -> Any:
        """Reads whole numbers as they are read elsewhere."""
        if not isinstance(periods, dict):
            return periods
        return {name: read_number(every, is_whole=True) for name, every in periods.items()}

    def is_due(self, step: int, every: int, fragment: int) -> bool:
        """Returns whether a fragment is due after a step, from 1."""
        return (step + fragment * every // self.fragments) % every == 0

    def fragment_of(self, name: str) -> int:
        """Returns the fragment of a parameter, by its logical name."""
        kind, index, *_ = name.split(".")
        if kind in _LAYERS:
            return int(index) % self.fragments
        if kind in _BEFORE_LAYERS:
            return 0
        return self.fragments - 1
