"""Adds collectives to the process's record as they are entered and waited for.

Owns: their numbers, the names of groups. Must not know: what a collective does.
"""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch.distributed as dist

from megatron_ray.distributed.activity import PROCESS, GroupRecord, Operation


class Recorded(Operation):
    """A collective that the process's record shows while the host waits for it."""

    __slots__ = ("work",)
    work: Any
    """The handle of torch, or of messages; set once the collective is started."""

    def wait(self) -> object:
        """Waits for the collective as its handle does."""
        # Written out, because each call of a function costs a tenth of the record.
        mark = PROCESS.on_wait
        if mark is not None:
            mark(begins=True)
        started = perf_counter()
        PROCESS.waiting_since = started
        PROCESS.waiting = self
        try:
            return self.work.wait()
        finally:
            PROCESS.waiting = None
            PROCESS.waited_s += perf_counter() - started
            if mark is not None:
                mark(begins=False)

    def is_completed(self) -> bool:
        """Returns whether `wait` would return at once."""
        return bool(self.work.is_completed())


def enter(name: str, group: dist.ProcessGroup) -> Recorded:
    """Records a collective before it is started, which may block already."""
    record = PROCESS.groups.get(id(group)) or _add_group(group, group.group_desc)
    number = record.entered + 1
    record.entered = number
    entry = Recorded()
    entry.name = name
    entry.group = record
    entry.number = number
    entry.peer = None
    return entry


def enter_message(
    name: str, group: dist.ProcessGroup, peer: int, *, is_send: bool
) -> Recorded:
    """Records a message to or from a rank of the group."""
    record = PROCESS.groups.get(id(group)) or _add_group(group, group.group_desc)
    global_peer = record.members[peer]
    counts = record.received
    if is_send:
        counts = record.sent
    number = counts.get(global_peer, 0) + 1
    counts[global_peer] = number
    entry = Recorded.of(name, record, number)
    entry.peer = global_peer
    return entry


def name_groups(groups: Mapping[str, dist.ProcessGroup | None]) -> None:
    """Begins the process's record with these groups, each under its first name."""
    PROCESS.begin()
    for name, group in groups.items():
        if group is not None and id(group) not in PROCESS.groups:
            _add_group(group, name)


def _add_group(group: dist.ProcessGroup, axis: str) -> GroupRecord:
    record = GroupRecord(axis, tuple(dist.get_process_group_ranks(group)))
    PROCESS.groups[id(group)] = record
    return record
