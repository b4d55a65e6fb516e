"""Defines the levels and types of a job's events.

Owns: the set of both that this version knows. Pure. Must not know: messages, who reports
an event.
"""

from enum import StrEnum


class EventLevel(StrEnum):
    """How much an event matters."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class EventType(StrEnum):
    """Kind of an event. Services and drivers of later versions may add some."""

    JOB_CREATED = "job.created"
    JOB_RESOLVED = "job.resolved"
    JOB_PREPARING = "job.preparing"
    JOB_PREPARED = "job.prepared"
    JOB_QUEUED = "job.queued"
    JOB_ADMITTED = "job.admitted"
    JOB_SCHEDULING = "job.scheduling"
    JOB_STARTING = "job.starting"
    JOB_RUNNING = "job.running"
    JOB_RECOVERING = "job.recovering"
    JOB_RECOVERED = "job.recovered"
    JOB_PAUSING = "job.pausing"
    JOB_PAUSED = "job.paused"
    JOB_RESUMED = "job.resumed"
    JOB_CANCELLING = "job.cancelling"
    JOB_CANCELLED = "job.cancelled"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_STATE_IGNORED = "job.state_ignored"
    SPEC_WARNING = "spec.warning"
    DATA_NOTE = "data.note"
    DATA_FIRST_DOCUMENT = "data.first_document"
    PLACEMENT_WAITING = "placement.waiting"
    ATTEMPT_STARTED = "attempt.started"
    ATTEMPT_RUNNING = "attempt.running"
    ATTEMPT_HANG = "attempt.hang"
    ATTEMPT_FAILED = "attempt.failed"
    ATTEMPT_ABANDONED = "attempt.abandoned"
    ATTEMPT_ENDED = "attempt.ended"
    DIAGNOSIS_REQUESTED = "diagnosis.requested"
    JOB_DIAGNOSED = "job.diagnosed"
    RANKS_ASSIGNED = "ranks.assigned"
    RANKS_STARTED = "ranks.started"
    RANK_PHASE = "rank.phase"
    RANK_CHECKPOINT_WRITTEN = "rank.checkpoint_written"
    RANK_SKIPPED_STEP = "rank.skipped_step"
    RANK_SLOW = "rank.slow"
    RANK_RECOVERED = "rank.recovered"
    RANK_FAILED = "rank.failed"
    RANK_ENDED = "rank.ended"
    EVAL_COMPLETED = "eval.completed"
    CHECKPOINT_REQUESTED = "checkpoint.requested"
    CHECKPOINT_COMMITTED = "checkpoint.committed"
    CHECKPOINT_DELETED = "checkpoint.deleted"
    CHECKPOINT_DAMAGED = "checkpoint.damaged"
    NODE_DRAINING = "node.draining"
    NODE_EXCLUDED = "node.excluded"
    STORAGE_SLOW = "storage.slow"
    POLICY_DECISION = "policy.decision"
    SPARES_DISABLED = "spares.disabled"
    DRIVER_RESTARTED = "driver.restarted"
    DRIVER_ADOPTED = "driver.adopted"
