"""Decides how long a run goes on without checkpoints while its storage fails.

Owns: the limits. Pure: times come in as values. Must not know: threads, torch.
"""

from dataclasses import dataclass

MIN_FAILED = 3
"""Fewest saves in a row that fail before a run ends for it."""
MAX_FAILING_S = 600.0
"""Longest time from the first of them on; short outages then cost no step."""
RETRY_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Pauses before the attempts to write a last checkpoint, which no other follows."""


@dataclass(frozen=True)
class FailedSaves:
    """The saves in a row that have failed until now."""

    count: int = 0
    since: float = 0.0
    """When the first of them failed."""

    def with_another(self, now: float) -> "FailedSaves":
        """Returns them with one that has just failed."""
        if not self.count:
            return FailedSaves(1, now)
        return FailedSaves(self.count + 1, self.since)

    def ends_run(self, now: float) -> bool:
        """Whether the run must not train on."""
        return self.count >= MIN_FAILED and now - self.since > MAX_FAILING_S
