"""Keeps a job's attempts away from nodes that failures speak against.

Owns: the journal's list for the next attempt, and the event by which the service adds a
node to the cluster's list. Must not know: which failures do so (`decisions.exclusions`).
"""

from collections.abc import Sequence

from workers.decisions.faults import exclusions
from workers.decisions.faults.exclusions import BadNode
from workers.decisions.placement import plan_placement
from workers.driver.context import JobContext


def avoid_nodes(job: JobContext, bad: Sequence[BadNode]) -> None:
    """Has the next attempt avoid nodes, unless the job fits on no others."""
    if not bad:
        return
    avoid = dict(job.entry.avoid)
    for node in bad:
        avoid[node.node_id] = node.reason
    nodes = exclusions.mark(job.read_nodes(), avoid)
    plan = plan_placement(job.spec, nodes, job.entry.accelerator)
    # A job that needs the node is better off with an attempt there than with none.
    if not plan.is_feasible:
        return
    job.write(avoid=avoid)
    for node in bad:
        if node.is_listed:
            _record(job, node)


def _record(job: JobContext, node: BadNode) -> None:
    message = (
        f"node {node.address} is excluded until `megatron-ray cluster include "
        f"{node.node_id[:12]}`: {node.reason}"
    )
    data = {"node_id": node.node_id, "address": node.address, "reason": node.reason}
    job.records.event("node.excluded", message, "warn", data)
