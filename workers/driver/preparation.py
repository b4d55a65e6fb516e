"""Prepares the data of a job.

Owns: the phase PREPARING. Must not know: Ray, how data are prepared.
"""

from typing import Any

from megatron_ray.data.prepared import PreparedData
from workers.data_tasks import prepare_task
from workers.decisions.faults import failing_storage
from workers.decisions.observations import (
    DataPrepared,
    DataRejected,
    PreparationFailed,
    StopRequested,
)
from workers.driver.context import JobContext
from workers.protocol.events import EventType
from workers.protocol.states import JobState, StatusReason
from workers.ray.tasks import TaskFailedError

_TURN_S = 0.1
_NO_DATA = PreparedData(
    train=(), validation=(), tokenizer_path="", vocab_size=1, end_of_document=0
)
"""For a job that trains on none."""


class DataPreparation:
    """Prepares the data once, in a CPU task that is killed when the job ends."""

    def __init__(self, job: JobContext) -> None:
        self._job = job
        self._tasks = job.ports.tasks

    def run(self) -> DataPrepared | DataRejected | PreparationFailed | StopRequested:
        """Waits for the spec, then for the data."""
        self._await_spec()
        self._job.records.state(
            JobState.PREPARING, StatusReason.PREPARING_DATA, "preparing data"
        )
        if self._job.spec.preflight.mode == "only":
            return DataPrepared(_NO_DATA.model_dump(mode="json"))
        result = self._prepare()
        if not isinstance(result, dict):
            return result
        if "problems" in result:
            # The service fails the job with these problems, so no state is recorded at
            # the end.
            self._job.records.problems(result["problems"])
            first = result["problems"][0]
            return DataRejected(f"{first['pointer']}: {first['detail']}")
        return DataPrepared(dict(result["prepared"]))

    def _prepare(self) -> dict[str, Any] | PreparationFailed | StopRequested:
        """Returns the task's result; tries again for a while if the storage fails."""
        since = self._job.ports.clock()
        num_failures = 0
        while True:
            result = self._run_task()
            if not isinstance(result, dict) or "storage" not in result:
                return result
            num_failures += 1
            failing_s = self._job.ports.clock() - since
            pause_s = failing_storage.retry_s(
                num_failures, failing_s, failing_storage.PREPARING_S
            )
            if pause_s is None:
                message = f"preparing the data failed: {result['storage']}"
                return PreparationFailed(message, StatusReason.STORAGE_ERROR)
            if num_failures == 1:
                message = (
                    f"the data are not prepared yet, it is tried again: {result['storage']}"
                )
                self._job.records.event(EventType.DATA_DELAYED, message, "warn")
            stop = self._wait(pause_s)
            if stop is not None:
                return stop

    def _run_task(self) -> dict[str, Any] | PreparationFailed | StopRequested:
        """Returns the task's result, or why there is none."""
        # A restarted driver prepares again, but reuses prepared files by their
        # content's key.
        call = self._tasks.anywhere(prepare_task, self._job.entry.spec)
        try:
            while not self._tasks.is_done(call):
                stop = self._wait(_TURN_S)
                if stop is not None:
                    return stop
            return dict(self._tasks.result(call))
        except TaskFailedError as error:
            return PreparationFailed(f"preparing the data failed: {error}")
        finally:
            self._tasks.end(call)

    def _wait(self, seconds: float) -> StopRequested | None:
        """Waits, unless the job is to stop."""
        clock = self._job.ports.clock
        deadline = clock() + seconds
        while clock() < deadline:
            stop = self._job.stop_requested()
            if stop is not None:
                return stop
            self._job.ports.outbox.wait(max(0.0, min(_TURN_S, deadline - clock())))
        return None

    def record_result(self) -> None:
        """Records that the data are ready; the service then queues the job."""
        data = PreparedData.model_validate(self._job.entry.prepared)
        # The number of steps of a number of epochs follows from the data.
        num_steps = self._job.spec.training.steps_over(data.num_train_tokens)
        self._job.records.prepared(data, num_steps)

    def _await_spec(self) -> None:
        """Waits for a new job's spec, passed by the first `attach` and then journaled."""
        job = self._job
        while job.entry.spec is None:
            job.check_replaced()
            if job.desired is None:
                job.ports.outbox.wait(1.0)
            else:
                job.write(
                    spec=job.desired.spec,
                    resumes=job.desired.resumes,
                    code_version=job.ports.code_version,
                )
