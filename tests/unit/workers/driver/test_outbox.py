"""What becomes of a driver's records while the service comes and goes."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megatron_ray.storage.storage import open_storage
from tests.support.fake_service import FakeService
from workers.driver.records.outbox import Outbox, RecordLog
from workers.protocol.wire import DesiredJob, RecordBatch
from workers.rank.spool import Line
from workers.service_client import (
    ReplacedError,
    ServiceClient,
    ServiceRefusedError,
    ServiceUnavailableError,
)

JOB = "job-a"


@pytest.fixture
def service() -> Iterator[FakeService]:
    fake = FakeService()
    fake.want(JOB, desired="run", spec={}, job_dir="/nowhere")
    fake.up()
    yield fake
    if fake._server is not None:
        fake.down()


def open_outbox(folder: Path, epoch: int, from_checkpoints: Sequence[Line] = ()) -> Outbox:
    outbox = Outbox(JOB, RecordLog(open_storage(str(folder))))
    outbox.open(epoch, {"a1/r0": from_checkpoints})
    return outbox


def attach(outbox: Outbox, service: FakeService) -> None:
    outbox.attach(service.url, f"token-{JOB}", DesiredJob.model_validate(service.jobs[JOB]))


def line(n: int) -> Line:
    record = {"n": n, "at": 1.0, "kind": "step", "attempt": 1, "data": {"step": n}}
    return Line(n, "step", json.dumps(record).encode())


def test_records_are_on_disk_before_they_are_sent_and_go_on_numbering(
    tmp_path: Path, service: FakeService
) -> None:
    first = open_outbox(tmp_path, epoch=1)
    for index in range(205):
        first.append("event", {"type": "t", "index": index}, 1)
    first.close()
    assert len(list((tmp_path / "driver").iterdir())) == 3
    second = open_outbox(tmp_path, epoch=2)
    second.append("event", {"type": "t", "index": 205}, 1)
    assert not second.flush(timeout_s=0.2), "the address of the service is not known yet"
    attach(second, service)
    assert second.flush(timeout_s=10)
    assert [record["data"]["index"] for record in service.stored(JOB)] == list(range(206))
    assert second.stored("driver") == 206
    second.close()


def test_lines_wait_for_the_service_and_come_once(
    tmp_path: Path, service: FakeService
) -> None:
    outbox = open_outbox(tmp_path, epoch=1)
    attach(outbox, service)
    outbox.relay("a1/r0", [line(1), line(2)])
    assert outbox.flush(timeout_s=10)
    service.down()
    outbox.relay("a1/r0", [line(2), line(3)])
    assert outbox.last("a1/r0") == 3
    assert not outbox.flush(timeout_s=0.5)
    service.up()
    attach(outbox, service)
    assert outbox.flush(timeout_s=10)
    assert service.steps(JOB, 1) == [1, 2, 3]
    outbox.close()


def test_large_records_go_in_several_requests(tmp_path: Path, service: FakeService) -> None:
    numbers = {f"grad_norm/layers.{index}": 0.5 for index in range(2000)}
    data = {"step": 1, "numbers": numbers}
    lines = []
    for n in range(1, 61):
        record = {"n": n, "at": 1.0, "kind": "monitors", "attempt": 1, "data": data}
        lines.append(Line(n, "monitors", json.dumps(record).encode()))
    outbox = open_outbox(tmp_path, epoch=1)
    outbox.relay("a1/r0", lines)
    (batch, *_) = outbox._next_batches()
    assert [record.n for record in batch.records] == list(range(1, 26))
    outbox.close()


def test_a_restarted_driver_asks_what_is_stored(
    tmp_path: Path, service: FakeService
) -> None:
    service.records[(JOB, "a1/r0")] = [
        {"n": n, "kind": "step", "data": {"step": n}} for n in (1, 2)
    ]
    outbox = open_outbox(tmp_path, epoch=2)
    outbox.relay("a1/r0", [line(1), line(2), line(3)])
    attach(outbox, service)
    assert outbox.flush(timeout_s=10)
    assert service.steps(JOB, 1) == [1, 2, 3]
    outbox.close()


@pytest.mark.parametrize(
    ("from_checkpoints", "relayed", "stored"),
    [
        ((1, 2, 3, 4, 5), (), (1, 2, 3, 4, 5)),
        ((1, 2, 3, 4, 5), (4, 5, 6), (1, 2, 3, 4, 5, 6)),
        ((2, 3), (3, 4), (1, 2, 3, 4)),
        ((1, 2), (3,), (1, 2, 3)),
        (
            (5, 6),
            (),
            (1, 2),
            # what is between was lost: the service takes no gap, and nothing else may wait
            # for it
        ),
    ],
)
def test_records_in_checkpoints_are_sent_before_those_of_the_ranks(
    tmp_path: Path,
    service: FakeService,
    from_checkpoints: tuple[int, ...],
    relayed: tuple[int, ...],
    stored: tuple[int, ...],
) -> None:
    service.records[(JOB, "a1/r0")] = [
        {"n": n, "kind": "step", "data": {"step": n}} for n in (1, 2)
    ]
    outbox = open_outbox(tmp_path, 2, [line(n) for n in from_checkpoints])
    outbox.append("event", {"type": "t"}, 1)
    outbox.relay("a1/r0", [line(n) for n in relayed])
    attach(outbox, service)
    assert outbox.flush(timeout_s=10)
    assert tuple(service.steps(JOB, 1)) == stored
    assert len(service.stored(JOB)) == 1
    outbox.close()


def test_what_the_service_lacks_of_earlier_attempts_is_known_before_it_is_back(
    tmp_path: Path, service: FakeService
) -> None:
    service.records[(JOB, "a1/r0")] = [{"n": 1, "kind": "step", "data": {"step": 1}}]
    outbox = open_outbox(tmp_path, 2, [line(n) for n in (1, 2, 3)])
    outbox.append("event", {"type": "t"}, 2)
    outbox.relay("a2/r0", [line(1)])
    outbox.relay("a3/r0", [line(1), line(2)])

    def before(source: str) -> list[int]:
        return [record.n for record in outbox.unstored_before(source)]

    assert before("a3/r0") == [1, 1, 2, 3]
    assert before("a1/r0") == [1, 1, 2]
    attach(outbox, service)
    assert outbox.flush(timeout_s=10)
    assert before("a3/r0") == []
    outbox.close()


def test_requests_arrive_without_records(tmp_path: Path, service: FakeService) -> None:
    outbox = open_outbox(tmp_path, epoch=1)
    attach(outbox, service)
    service.want(JOB, desired="cancel")
    deadline = time.monotonic() + 10
    while outbox.desired is None or outbox.desired.desired != "cancel":
        assert time.monotonic() < deadline
        outbox.wait(0.1)
    outbox.attach(
        service.url,
        f"token-{JOB}",
        outbox.desired.model_copy(update={"revision": 0, "desired": "run"}),
    )
    assert outbox.desired.desired == "cancel", "an older request does not undo a newer one"
    outbox.close()


def test_a_newer_driver_ends_an_older_one(tmp_path: Path, service: FakeService) -> None:
    service.epochs[JOB] = 5
    outbox = open_outbox(tmp_path, epoch=4)
    outbox.append("event", {"type": "t"}, 1)
    attach(outbox, service)
    assert not outbox.flush(timeout_s=10)
    assert outbox.replaced == "epoch 4 is over"
    outbox.close()


def test_a_driver_tells_how_many_records_its_folder_has(
    tmp_path: Path, service: FakeService
) -> None:
    for num_logged in (0, 2):
        outbox = open_outbox(tmp_path, epoch=num_logged + 1)
        outbox.append("event", {"type": "t"}, 1)
        outbox.append("event", {"type": "t"}, 1)
        attach(outbox, service)
        assert outbox.flush(timeout_s=10)
        assert service.last_ns[-1] == num_logged
        outbox.close()


def test_failures_of_the_link_have_classes(service: FakeService) -> None:
    with (
        ServiceClient(service.url, "wrong") as link,
        pytest.raises(
            ServiceRefusedError, match=r"refused .401 unauthorized.: wrong token"
        ),
    ):
        link.hello()
    with ServiceClient(service.url, f"token-{JOB}") as link:
        assert link.cursor(JOB, 3).stored == {}
        with pytest.raises(ReplacedError, match="epoch 2 is over"):
            link.records(RecordBatch(job_id=JOB, epoch=2, source="driver"))
    with (
        ServiceClient("http://127.0.0.1:1", "x") as link,
        pytest.raises(ServiceUnavailableError, match=r"GET http://127.0.0.1:1/.*Connect"),
    ):
        link.hello()
