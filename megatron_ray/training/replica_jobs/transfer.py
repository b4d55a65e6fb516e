"""Sends one job's state to another, rank by rank.

Owns: the messages. Must not know: who sends to whom.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ray.distributed.outside_group import OutsideGroup
from megatron_ray.training.state_copy import StateCopy

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class _Header:
    """What precedes a state's bytes."""

    step: int
    layout: str
    num_bytes: int
    state: Mapping[str, Any]


def send_state(copy: StateCopy, group: OutsideGroup) -> None:
    """Sends a rank's state to the other member. Raises PeerLostError."""
    header = _Header(copy.step, copy.layout, len(copy.memory), copy.state)
    text = torch.frombuffer(bytearray(json.dumps(vars(header)).encode()), dtype=torch.uint8)
    group.broadcast(torch.tensor([text.numel()]))
    group.broadcast(text)
    _broadcast_blocks(torch.frombuffer(copy.memory, dtype=torch.uint8), group)


def receive_state(group: OutsideGroup) -> StateCopy:
    """Returns the state that the first member sends. Raises PeerLostError."""
    length = torch.zeros(1, dtype=torch.int64)
    group.broadcast(length)
    text = torch.empty(int(length), dtype=torch.uint8)
    group.broadcast(text)
    header = _Header(**json.loads(text.numpy().tobytes()))
    memory = torch.empty(header.num_bytes, dtype=torch.uint8)
    _broadcast_blocks(memory, group)
    return StateCopy(header.step, memory.numpy().data, header.layout, header.state, {})


def _broadcast_blocks(memory: Tensor, group: OutsideGroup) -> None:
    for block in torch.split(memory, _BLOCK_BYTES):
        group.broadcast(block)
