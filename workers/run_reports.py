"""Writes the report file of a run without a driver.

Owns: the file that `--reports` names, and the report about its data. Must not know: Ray,
HTTP, how ranks train.
"""

from pathlib import Path
from typing import Any

from megatron_ray.data.prepared import PreparedData
from megatron_ray.reports import PhaseReport, Report
from workers.protocol.job import JobSpec
from workers.rank.messages import UserError
from workers.rank.spool import Spool, holds_reports
from workers.run_start import Notify, RunStart


class RunReports:
    """Rank 0's reports in a file; without a path, and before `open`, they go nowhere.

    Raises UserError when the file cannot be written.
    """

    def __init__(self, path: Path | None, notify: Notify) -> None:
        self._path = path
        self._notify = notify
        self._spool: Spool | None = None

    def open(self, start: RunStart) -> None:
        """Opens the file for an attempt; one with other contents would be spoilt."""
        path = self._path
        if path is None:
            return
        is_first = self._spool is None
        self.close()
        try:
            if path.is_file() and not holds_reports(path):
                raise UserError(
                    f"cannot write --reports {path}: the file has something other than "
                    "reports in it; give another one"
                )
            self._spool = Spool(path, start.attempt, segment_bytes=None)
        except OSError as error:
            raise _error(path, error) from error
        if is_first and self._spool.last_n and start.resume_from is None:
            self._notify(
                f"warning: --reports {path} has reports of another run, after which those of "
                "this one are written"
            )

    def write(self, item: Report) -> None:
        """Appends a report."""
        if self._spool is None:
            return
        try:
            self._spool.append(item.kind, vars(item))
        except OSError as error:
            raise _error(self._spool.path, error) from error

    def close(self) -> None:
        """Closes the file."""
        if self._spool is not None:
            self._spool.close()


def prepared_report(spec: JobSpec, data: PreparedData, seconds: float) -> PhaseReport:
    """Returns the first report: the data, and the number of steps on them."""
    detail: dict[str, Any] = {"steps": spec.training.steps_over(data.num_train_tokens)}
    for split, corpora in (("train", data.train), ("validation", data.validation)):
        detail[f"{split}_documents"] = sum(corpus.num_documents for corpus in corpora)
        detail[f"{split}_tokens"] = sum(corpus.num_tokens for corpus in corpora)
    return PhaseReport("prepare", seconds, detail | {"notes": list(data.notes)})


def _error(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write --reports {path}: {error.strerror or error}")
