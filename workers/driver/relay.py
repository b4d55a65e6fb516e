"""Turns a rank's reports into records of the service's protocol.

Owns: the events that reports become, and their wording. Pure.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from megatron_ray.reports import (
    CheckpointFailedReport,
    CheckpointReport,
    EvalReport,
    MonitorReport,
    PeerCopiesRefusedReport,
    PhaseReport,
    ProfileReport,
    ReplicaGroupsReport,
    RuleReport,
    SkippedStepReport,
    SpeedReport,
    StepReport,
)
from workers.decisions.failures import FailureKind, describe_error
from workers.decisions.preflight.figures import describe_speed
from workers.rank.spool import Line

METRICS = (StepReport.kind, EvalReport.kind, MonitorReport.kind)


def to_record(line: Line) -> Line:
    """Returns a report of rank 0 as the record that is sent, with the same number.

    Steps, evaluations and what is monitored are sent as they are; everything else becomes
    an event.
    """
    if line.kind in METRICS:
        return line
    # The number is kept, because the service accepts no gaps within a source.
    record = json.loads(line.text)
    data = record["data"]
    level, message = _describe(line.kind, data)
    event = {
        "type": f"rank.{line.kind}",
        "level": level,
        "message": message,
        "data": data,
        "ranks": [0],
    }
    record |= {"kind": "event", "data": event}
    return Line(line.n, "event", json.dumps(record).encode())


def _describe(kind: str, data: dict[str, Any]) -> tuple[str, str]:
    """Returns level and message of an event."""
    if kind == PhaseReport.kind:
        return "info", f"{data['phase']} took {data['seconds']:.2f} s"
    if kind == CheckpointReport.kind:
        return "info", (
            f"wrote {data['bytes_written']} bytes of the checkpoint of step {data['step']} in "
            f"{data['seconds']:.2f} s"
        )
    if kind == CheckpointFailedReport.kind:
        return "warn", describe_failed_save(0, data)
    if kind in (SkippedStepReport.kind, RuleReport.kind):
        return "warn", str(data["message"])
    if kind == PeerCopiesRefusedReport.kind:
        return "warn", (
            f"the copies of step {data['step']} in the ranks' memory cannot be used, so the "
            f"attempt starts from storage: {data['cause']}"
        )
    if kind == SpeedReport.kind:
        return "info", describe_speed(data)
    if kind in _LEVELS_VARY:
        return _LEVELS_VARY[kind](data)
    if kind == "ended":
        return "info", f"{data['outcome']} at step {data['step']}"
    return "info", ""


def describe_profile(data: Mapping[str, Any]) -> tuple[str, str]:
    """Returns level and message of the event of a rank's profile."""
    report = ProfileReport(**data)
    level = "info"
    if report.problem is not None:
        level = "warn"
    return level, report.sentence()


def _describe_groups(data: Mapping[str, Any]) -> tuple[str, str]:
    """Returns level and message of the event of other replica groups than before."""
    report = ReplicaGroupsReport(**data)
    level = "info"
    if report.lost:
        level = "warn"
    return level, report.sentence()


def describe_failed_save(rank: int, data: Mapping[str, Any]) -> str:
    """Returns the message about a rank that could not write its part of a checkpoint."""
    return (
        f"rank {rank} could not write its part of the checkpoint of step {data['step']}, and "
        f"training goes on: {data['cause']}"
    )


def _describe_failure(data: dict[str, Any]) -> tuple[str, str]:
    failure_kind, message = describe_error(data)
    # A rank that only lost a peer is not the root cause, so its event is no warning.
    # The original error stays in the event's data.
    if failure_kind is FailureKind.COLLATERAL:
        return "info", "rank 0: a peer disconnected"
    return "warn", f"rank 0: {message}"


_LEVELS_VARY: Mapping[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    ProfileReport.kind: describe_profile,
    ReplicaGroupsReport.kind: _describe_groups,
    "failed": _describe_failure,
}
"""What describes events whose level depends on what has happened."""
