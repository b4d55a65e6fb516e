"""Defines what a rank reports while it trains.

Owns: the fields of reports. Torch-free. Must not know: readers of reports.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

StepPart = Literal[
    "data", "forward", "backward", "communication", "optimizer", "checkpoint", "other"
]
"""What a rank spends the time of a step on; the parts add up to the whole.

- `data`: reading samples and making batches of them.
- `forward` and `backward`: the passes, the latter with what they recompute.
- `communication`: waits for other ranks in collectives and messages, wherever they occur.
  What overlaps with computation costs no time and does not count.
- `optimizer`: gradient norm, clipping and the update.
- `checkpoint`: copying the state for a checkpoint after the step before, and waits for the
  checkpoint before that one.
- `other`: the rest, such as reports and the gaps between steps.
"""
STEP_PARTS: tuple[StepPart, ...] = get_args(StepPart)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, the same on every rank but for times and memory.

    Losses are means over the step's tokens of the whole world.
    """

    kind: ClassVar[str] = "step"
    step: int
    """Number of the update, from 1."""
    loss: float
    """Mean negative log-likelihood in nats per token."""
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    num_tokens: int
    """Tokens that counted in the loss, all ranks."""
    consumed_samples: int
    """Samples used since the start of the job, this step included."""
    step_s: float
    tokens_per_s: float
    mfu: float
    """Model FLOPs utilisation against the device's peak; 0 where the peak is not
    known."""
    memory_bytes: int
    """Peak device memory (RSS on CPU)."""
    split_s: dict[str, float] = field(default_factory=dict)
    """Seconds of the step by part, see StepPart, as this rank has measured them."""
    other_losses: dict[str, float] = field(default_factory=dict)
    """Auxiliary losses before weighting, per loss token: load_balancing_loss (or
    seq_load_balancing_loss) and z_loss, means over the layers with experts, and
    mtp_<n>_loss of each MTP layer."""
    skipped_steps: int = 0
    """Steps of the job so far, this one included, that were skipped because their loss
    or gradient norm was not finite."""
    loss_scale: float | None = None
    """Factor of the step's loss in fp16; None in other precisions."""
    weight_decay: float | None = None
    """Weight decay of the step; None where every step has the same."""


@dataclass(frozen=True)
class SkippedStepReport:
    """A step has left weights and optimizer state as they were."""

    kind: ClassVar[str] = "skipped_step"
    step: int
    loss: float
    grad_norm: float
    message: str
    """What happened and why, with the numbers."""


@dataclass(frozen=True)
class RuleReport:
    """A step has broken a rule of training.rules, or was good after it had broken one."""

    kind: ClassVar[str] = "training_rule"
    step: int
    verdict: str
    """What follows or was concluded: rerun, recheck, transient, persistent, stop or
    rollback."""
    loss: float
    grad_norm: float
    message: str
    """What happened and what follows, with the numbers."""
    suspect: int | None = None
    """Rank that may have computed the step wrongly, for `recheck` and `persistent`."""


@dataclass(frozen=True)
class EvalReport:
    """The loss over (part of) a split."""

    kind: ClassVar[str] = "eval"
    step: int
    split: str
    loss: float
    """Mean negative log-likelihood in nats per token, over the blend of the sources."""
    num_tokens: int
    source_losses: dict[str, float] = field(default_factory=dict)
    """The same over the samples of each source, by its name."""


@dataclass(frozen=True)
class MonitorReport:
    """What the callbacks of a run have measured in a step, the same on every rank."""

    kind: ClassVar[str] = "monitors"
    step: int
    numbers: dict[str, float]
    """By name, such as `grad_norm/layers.3`."""


@dataclass(frozen=True)
class CheckpointReport:
    """A rank's part of a checkpoint is durable.

    The checkpoint counts once it has been committed, which needs every rank's part.
    """

    kind: ClassVar[str] = "checkpoint_written"
    step: int
    path: str
    """Folder of the checkpoint."""
    bytes_written: int
    seconds: float


@dataclass(frozen=True)
class CheckpointFailedReport:
    """A rank could not write its part of a checkpoint, and trains on without it."""

    kind: ClassVar[str] = "checkpoint_failed"
    step: int
    path: str
    """Folder of the checkpoint."""
    cause: str
    """What the storage has refused, where, and the remedy if there is only one."""


@dataclass(frozen=True)
class PeerCopiesRefusedReport:
    """A run does not continue from copies in the ranks' memory, as it was to."""

    kind: ClassVar[str] = "peer_copies_refused"
    step: int
    """Step of the copies."""
    cause: str
    """Which rank has no usable copy, and why."""


@dataclass(frozen=True)
class ReplicaGroupsReport:
    """Other jobs than before are with this one, which is a replica group of their run."""

    kind: ClassVar[str] = "replica_groups"
    step: int
    """Steps that this job has taken."""
    groups: tuple[int, ...]
    """Those that go on together, this job's included."""
    num_groups: int
    """Groups of the run."""
    joined: tuple[int, ...] = ()
    """Those that have started since, or started again."""
    lost: tuple[int, ...] = ()
    """Those that are there no longer."""

    def sentence(self) -> str:
        """Returns which groups are there, and what has changed, in one line."""
        text = (
            f"{len(self.groups)} of {self.num_groups} replica groups are there after step "
            f"{self.step}: {_numbers(self.groups)}"
        )
        if self.joined:
            text += f"; joined: {_numbers(self.joined)}"
        if self.lost:
            text += f"; lost: {_numbers(self.lost)}"
        return text


def _numbers(groups: tuple[int, ...]) -> str:
    return ", ".join(map(str, groups))


@dataclass(frozen=True)
class ProfileReport:
    """A rank has written a profile of some steps, or could not."""

    kind: ClassVar[str] = "profile"
    rank: int
    number: int
    """Number of the request within the run; 0 is that of its config."""
    first_step: int
    last_step: int
    folder: str = ""
    """Path or URI of the folder with its files."""
    files: tuple[str, ...] = ()
    """Names of the files: the trace and the memory."""
    seconds: float = 0.0
    """Time of the steps, with the cost of recording them."""
    operators: tuple[dict[str, Any], ...] = ()
    """The most expensive operators, {name, calls, seconds, share}: their own time, on the
    device where there is one, and its share of that of all."""
    problem: str | None = None
    """Why there is no profile."""

    @property
    def steps(self) -> str:
        """The steps as people write them."""
        if self.first_step == self.last_step:
            return f"step {self.first_step}"
        return f"steps {self.first_step}-{self.last_step}"

    def sentence(self) -> str:
        """Returns what has happened, in one line."""
        if self.problem is not None:
            return f"no profile of {self.steps} on rank {self.rank}: {self.problem}"
        return f"wrote a profile of {self.steps} on rank {self.rank} to {self.folder}"


@dataclass(frozen=True)
class PhaseReport:
    """A rank has finished a phase of its start-up: rendezvous, model, load, data ..."""

    kind: ClassVar[str] = "phase"
    phase: str
    seconds: float
    """Since the previous phase of this rank."""
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SpeedReport:
    """A rank has measured its device or a link before it trains."""

    kind: ClassVar[str] = "speed"
    part: str
    """`device`, `node` (all-reduce in its node), `link` (messages to `peer`) or `world`
    (all-reduce of all ranks)."""
    device: str = ""
    """Name of the device; only in that part."""
    flops: float | None = None
    """Floating-point operations per second of matrix products."""
    bytes_per_s: float | None = None
    """Bandwidth of the device's memory, or of each rank's link."""
    peer: int | None = None
    """Rank at the other end of the link."""
    problem: str | None = None
    """What went wrong: wrong results, or a connection that does not work."""


Report = (
    StepReport
    | SkippedStepReport
    | RuleReport
    | EvalReport
    | MonitorReport
    | CheckpointReport
    | CheckpointFailedReport
    | PeerCopiesRefusedReport
    | ReplicaGroupsReport
    | ProfileReport
    | PhaseReport
    | SpeedReport
)
