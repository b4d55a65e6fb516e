"""Prints a rank's log, piece by piece and from attempt to attempt."""

import sys
import time
from dataclasses import dataclass

import typer

from service.cli.failure import CommandError
from service.cli.output import print_json_line
from service.client import Client
from workers.protocol.states import JobState

_LOG_POLL_S = 0.5


def print_log(
    client: Client,
    job_id: str,
    *,
    rank: int,
    attempt: int | None,
    follow: bool,
    as_json: bool,
) -> None:
    """Prints the log of one attempt, or of the newest one, which may change meanwhile.

    Raises CommandError when there is no log.
    """
    reader = _LogReader(
        client, job_id, rank, attempt, follows_attempts=attempt is None, as_json=as_json
    )
    has_ended = reader.read()
    while not has_ended and follow:
        time.sleep(_LOG_POLL_S)
        has_ended = reader.read()
    if attempt is None and not follow and not as_json and (reader.attempt or 0) > 1:
        # On stderr, because stdout is the log.
        typer.echo(
            f"this is attempt {reader.attempt}; show an earlier one with --attempt",
            err=True,
        )
    if not reader.has_printed:
        message = f"rank {rank} of {job_id} has no log"
        if not has_ended:
            message += " yet"
        raise CommandError(
            message, remedy=f"see the job's state with `megatron-ray show {job_id}`"
        )


@dataclass
class _LogReader:
    """The position in one rank's log."""

    client: Client
    job_id: str
    rank: int
    attempt: int | None
    follows_attempts: bool
    """Whether to move on to the next attempt."""
    as_json: bool
    offset: int = 0
    has_printed: bool = False

    def read(self) -> bool:
        """Prints all there is; returns whether the job had ended before."""
        # The status comes first: what a job that has ended wrote is all there.
        job = self.client.show(self.job_id)
        current = int(job.get("attempt") or 0)
        if self.attempt is None or (self.follows_attempts and current > self.attempt):
            # The rest of the previous attempt comes before the next one.
            if self.attempt:
                self._print_rest()
            self.attempt = current or None
            self.offset = 0
        if self.attempt:
            self._print_rest()
        return JobState(job["status"]).is_terminal

    def _print_rest(self) -> None:
        while True:
            piece = self.client.logs(
                self.job_id, rank=self.rank, attempt=self.attempt, offset=self.offset
            )
            # An unchanged offset is the end of the log so far.
            offset = int(piece.get("next_offset") or self.offset)
            if offset <= self.offset:
                return
            self.offset = offset
            self.has_printed = True
            if self.as_json:
                print_json_line(piece)
            else:
                sys.stdout.write(str(piece.get("data") or ""))
                sys.stdout.flush()
