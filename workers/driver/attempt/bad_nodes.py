"""Keeps a job's attempts away from nodes that failures speak against.

Owns: the journal's list for the next attempt, and the event by which the service adds a
node to the cluster's list. Must not know: which failures do so (`decisions.exclusions`).
"""

from collections.abc import Mapping, Sequence

from workers.decisions.faults.exclusions import BadNode
from workers.decisions.placement import plan_placement
from workers.driver.context import JobContext


def avoid_nodes(job: JobContext, bad: Sequence[BadNode]) -> None:
    """Has the next attempt avoid nodes, unless the job fits on no others."""
    # These go on in the processes that are left, which a move to other nodes would end: an
    # elastic job without the silent node, others from the copies in their memory.
    if job.spec.elastic is not None or job.keeps_copies:
        bad = [node for node in bad if node.is_listed]
    if not bad:
        return
    # A job that needs the node is better off with an attempt there than with none.
    if _fits_without(job, _with_reasons(job, bad)):
        _avoid(job, bad)


def leave_nodes(job: JobContext, bad: Sequence[BadNode]) -> None:
    """Has the next attempt avoid nodes that the job has measured to be bad.

    A job that fits on no others waits, because its spec asks for good ones. One that only
    measures leaves them to its user.
    """
    if job.spec.preflight.mode == "only":
        return
    _avoid(job, bad)


def _with_reasons(job: JobContext, bad: Sequence[BadNode]) -> dict[str, str]:
    avoid = dict(job.entry.avoid)
    for node in bad:
        avoid[node.node_id] = node.reason
    return avoid


def _avoid(job: JobContext, bad: Sequence[BadNode]) -> None:
    job.write(avoid=_with_reasons(job, bad))
    for node in bad:
        if node.is_listed:
            _record(job, node)


def _fits_without(job: JobContext, avoid: Mapping[str, str]) -> bool:
    plan = plan_placement(
        job.spec,
        job.ports.read_nodes(),
        job.entry.accelerator,
        size=job.entry.bundle_size,
        avoid={**job.avoided_nodes, **avoid},
    )
    return plan.is_feasible


def _record(job: JobContext, node: BadNode) -> None:
    message = (
        f"node {node.address} is excluded until `megatron-ray cluster include "
        f"{node.node_id[:12]}`: {node.reason}"
    )
    data = {"node_id": node.node_id, "address": node.address, "reason": node.reason}
    job.records.event("node.excluded", message, "warn", data)
