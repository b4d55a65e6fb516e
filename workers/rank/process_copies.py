"""Bundles what a rank's process has for copies of states, over all its attempts.

Owns: the server's life, and which of rank 0's reports a copy contains. Must not know:
Ray, torch.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from workers.decisions.peers.copies import CopyFacts
from workers.rank.messages import StartRequest
from workers.rank.peer_copies import PeerCopies
from workers.rank.peer_server import PeerAddress, PeerServer
from workers.rank.spool import Line, SpoolReader, parse_line, report_path

_MAX_REPORT_BYTES = 4 << 20
_LINES_AT_ONCE = 500


class ProcessCopies:
    """The copies in this process and their server, which starts with their first use."""

    def __init__(self, job_id: str, host: str, folder: Path) -> None:
        self.copies = PeerCopies(job_id)
        self._host = host
        self._folder = folder
        self._server: PeerServer | None = None
        self.stored = 0
        """Reports of the attempt up to this number are stored in the service."""

    @property
    def address(self) -> PeerAddress:
        """Where other processes find the copies."""
        if self._server is None:
            self._server = PeerServer(self.copies, self._host)
        return self._server.address

    def facts(self) -> tuple[CopyFacts, ...]:
        """Returns which copies are here."""
        return self.copies.facts()

    def unstored_reports(self, request: StartRequest) -> bytes:
        """Returns the oldest reports of the attempt that the service may lack, as lines.

        Rank 0's copy has them, because its node may be lost together with its spool.
        """
        path = report_path(self._folder, request.attempt, request.env.rank)
        content: list[bytes] = []
        size = 0
        # Without a limit on the lines at once, a long outage would fill the memory.
        reader = SpoolReader(path)
        after = self.stored
        while lines := reader.read(after, _LINES_AT_ONCE):
            for line in lines:
                content.append(line.text + b"\n")
                size += len(line.text)
                if size > _MAX_REPORT_BYTES:
                    return b"".join(content)
            after = lines[-1].n
        return b"".join(content)

    def reports_in_copy(self, attempt: int, step: int) -> Sequence[Line]:
        """Returns the reports in rank 0's copy, if it is here."""
        copy = self.copies.find(attempt, step, 0)
        if copy is None:
            return []
        lines = []
        for raw_line in bytes(copy.parts[-1]).splitlines():
            line = parse_line(raw_line)
            if line is not None:
                lines.append(line)
        return lines

    def log(self, message: str) -> None:
        """Writes a line to the rank's log."""
        os.write(2, f"{time.strftime('%H:%M:%S')} {message}\n".encode())

    def close(self) -> None:
        """Ends the server."""
        if self._server is not None:
            self._server.close()
            self._server = None
