"""Prints what this process does when a run under torchrun makes no progress.

Owns: the thread that looks, and the text. There is no driver that could ask all ranks, so
each prints its own part; nothing is ended. Must not know: Ray, HTTP, other ranks.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from megatron_ray.reports import Report, StepReport
from workers.decisions.liveness import Progress, hang_limit_s
from workers.decisions.ranks.diagnosis import RankEvidence, is_waiting, place_of
from workers.rank.evidence import gather_evidence

_TURN_S = 1.0


class HangWatch:
    """Watches the thread that enters the `with` block, which reports its steps to it.

    `timeout_s` is the limit of the spec, if any; `write` gets the text of a hang, once
    until the next report.
    """

    def __init__(
        self,
        rank: int,
        timeout_s: float | None,
        write: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank = rank
        self._timeout_s = timeout_s
        self._write = write
        self._clock = clock
        self._progress = Progress(clock(), is_starting=True)
        self._step = 0
        self._printed_at: float | None = None
        self._training = threading.current_thread()
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._training = threading.current_thread()
        threading.Thread(target=self._run, name="hang-watch", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()

    def advanced(self, report: Report) -> None:
        """Notes a report of this rank."""
        has_stepped = isinstance(report, StepReport)
        if isinstance(report, StepReport):
            self._step = report.step
        self._progress = self._progress.advanced(self._clock(), has_stepped=has_stepped)

    def check(self) -> None:
        """Prints a hang when the time without a report is above the limit."""
        progress = self._progress
        limit_s = hang_limit_s(progress, self._timeout_s)
        quiet_s = self._clock() - progress.last_at
        if quiet_s <= limit_s or self._printed_at == progress.last_at:
            return
        self._printed_at = progress.last_at
        evidence = gather_evidence(self._rank, self._step, self._training, has_ended=False)
        self._write(describe(evidence, quiet_s, limit_s))

    def _run(self) -> None:
        while not self._ended.wait(_TURN_S):
            self.check()


def describe(evidence: RankEvidence, quiet_s: float, limit_s: float) -> str:
    """Returns what a rank does in a hang, a line each, and its stack."""
    doing = place_of(evidence)
    if evidence.wait is not None:
        doing = f"it has waited for {evidence.wait.seconds:.0f} s in {evidence.wait}"
    elif is_waiting(evidence):
        doing = f"it waits in {evidence.frames[0]}"
    lines = [
        f"rank {evidence.rank}: no report for {quiet_s:.0f} s (limit {limit_s:.0f} s) after "
        f"step {evidence.step}; {doing}"
    ]
    for frame in evidence.frames:
        lines.append(f"    {frame}")
    return "\n".join(lines) + "\n"
