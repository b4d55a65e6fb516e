"""Decides how long a job goes on while its storage fails or does not answer.

Owns: the limits, and how often commits and preparations are tried again. Pure: times come
in as values. Must not know: Ray, torch, clocks, storage.
"""

from collections.abc import Collection

from workers.decisions.ranks.diagnosis import Evidence, RankEvidence

PREPARING_S = 600.0
"""Seconds for which the preparation of the data is tried again."""
RUNNING_S = 600.0
"""Seconds for which a commit is tried again while the ranks train on."""
ENDED_S = 60.0
"""The same once the ranks have ended, which keep their resources meanwhile."""
STALL_S = 600.0
"""Seconds without progress after which ranks that wait for the storage count as hung."""
LOOK_EVERY_S = 10.0
"""Seconds after which the ranks of a stalled attempt are examined again."""
_LONGEST_PAUSE_S = 30.0
_STORAGE_CODE = ("megatron_ray/storage/", "megatron_ray/checkpoint/")


def retry_s(num_failures: int, failing_s: float, limit_s: float) -> float | None:
    """Returns the pause before something is tried again; None: no more.

    `num_failures` are its failures so far, the first of them `failing_s` ago.
    """
    if failing_s >= limit_s:
        return None
    return float(min(_LONGEST_PAUSE_S, 2.0 ** min(num_failures - 1, 10)))


def waits_for_storage(evidence: Evidence, culprits: Collection[int]) -> bool:
    """Whether the storage is what ranks without progress wait for.

    `culprits` are the ranks that the others wait for; with none, any rank counts.
    """
    ranks = culprits or evidence.keys()
    answered = [evidence[rank] for rank in ranks]
    return any(row is not None and _uses_storage(row) for row in answered)


def _uses_storage(row: RankEvidence) -> bool:
    if row.wait is not None:
        return False
    return any(frame.file.startswith(_STORAGE_CODE) for frame in row.frames)
