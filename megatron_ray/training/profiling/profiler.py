"""Decides at each step of the loop whether it is profiled.

Owns: which request is carried out, its report. A profile concerns one rank alone: others
need not know of it. Must not know: torch's profiler, senders of requests.
"""

from collections.abc import Callable
from typing import Protocol

from megatron_ray.commands import ProfileRequest
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.reports import ProfileReport
from megatron_ray.storage.errors import StorageError
from megatron_ray.storage.storage import open_storage
from megatron_ray.training.profiling.recording import StepRecording

ProfileSource = Callable[[], ProfileRequest | None]
"""Returns the newest request to this rank; called once per step, so it returns at once."""


class Profiler(Protocol):
    """Is called around each step of the loop."""

    def begin_step(self, step: int) -> None:
        """Called before the step with this number."""

    def end_step(self, step: int) -> None:
        """Called when it has been launched."""


class NoProfiler:
    """Stands for the profiler of a run that has none."""

    def begin_step(self, step: int) -> None:
        """Does nothing."""

    def end_step(self, step: int) -> None:
        """Does nothing."""


NO_PROFILER = NoProfiler()


class StepProfiler:
    """Profiles the steps of requests on one rank.

    `planned` is the request of the config, if it has one for this rank. A profile that cannot
    be written is reported, and the run goes on without it.
    """

    def __init__(
        self,
        storage_path: str,
        attempt: int,
        mesh: ParallelMesh,
        *,
        report: Callable[[ProfileReport], None],
        source: ProfileSource,
        planned: ProfileRequest | None = None,
    ) -> None:
        self._storage_path = storage_path
        self._attempt = attempt
        self._rank = mesh.rank
        self._device = mesh.device
        self._report = report
        self._source = source
        self._seen: ProfileRequest | None = None
        self._request = planned
        """The request that waits for its steps, or is carried out."""
        self._recording: StepRecording | None = None
        self._last_step = 0

    def begin_step(self, step: int) -> None:
        """Begins the recording of a step that is to be profiled."""
        newest = self._source()
        if newest is not self._seen:
            self._take(newest, step)
        request = self._request
        if request is None:
            return
        if self._recording is None and step == request.first_step:
            self._recording = StepRecording(self._device)
        if self._recording is not None:
            self._recording.begin_step(step)

    def end_step(self, step: int) -> None:
        """Ends the recording of the step; writes the profile after the last one."""
        self._last_step = step
        if self._recording is None or self._request is None:
            return
        self._recording.end_step()
        if step == self._request.last_step:
            self._write(self._request, self._recording)
            self._request = None
            self._recording = None

    def discard(self) -> None:
        """Ends a recording without its files."""
        if self._recording is not None:
            self._recording.discard()
            self._recording = None

    def close(self) -> None:
        """Reports a profile whose steps the run has not reached."""
        self.discard()
        if self._request is not None:
            self._refuse(self._request, f"the run has ended after step {self._last_step}")
            self._request = None

    def _take(self, newest: ProfileRequest | None, step: int) -> None:
        """Takes a new request, unless it comes too late."""
        # The same request again, such as from a driver that has restarted.
        is_repeated = newest == self._seen
        self._seen = newest
        if newest is None or is_repeated:
            return
        if self._request is not None:
            self._refuse(newest, f"a profile of steps {self._request} is not written yet")
        elif step > newest.first_step:
            self._refuse(newest, f"it came too late: step {step} begins")
        else:
            self._request = newest

    def _write(self, request: ProfileRequest, recording: StepRecording) -> None:
        recording.stop()
        folder = request.folder(self._storage_path, self._attempt)
        try:
            files = recording.write(open_storage(folder), self._rank)
        # The disk of the temporary files may be full, too.
        except (StorageError, OSError) as error:
            self._refuse(request, f"its files cannot be written: {error}")
            return
        self._report(
            ProfileReport(
                self._rank,
                request.number,
                request.first_step,
                request.last_step,
                folder,
                files,
                recording.seconds,
                recording.operators(),
            )
        )

    def _refuse(self, request: ProfileRequest, problem: str) -> None:
        self._report(
            ProfileReport(
                self._rank,
                request.number,
                request.first_step,
                request.last_step,
                problem=problem,
            )
        )
