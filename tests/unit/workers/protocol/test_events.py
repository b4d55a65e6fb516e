"""The types that a client may filter by are those that the sources report."""

import re
from pathlib import Path

from workers.protocol.events import EventType
from workers.protocol.states import JobState

ROOT = Path(__file__).parents[4]
EVENT = re.compile(r'(?:event|Event)\(\s*(?:record, |self\._job, )?"([a-z]+\.[a-z_]+)"')


def test_every_reported_type_is_known() -> None:
    reported = {f"job.{state}" for state in JobState}
    for package in ("service", "workers"):
        for path in (ROOT / package).rglob("*.py"):
            reported |= set(EVENT.findall(path.read_text()))
    assert len(reported) > 20
    assert reported <= set(EventType)
