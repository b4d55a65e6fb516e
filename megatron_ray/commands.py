"""Defines commands to a running training loop, and how all ranks agree on one.

Owns: the commands, their precedence, the form of all votes and of marks of ranks, requests
of profiles and where their files are. Torch-free. Must not know: the sender of a command.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import ceil


class Command(IntEnum):
    """A command for the next step boundary; the larger of two commands wins."""

    CONTINUE = 0
    CHECKPOINT = 1
    """Save and continue."""
    STOP = 2
    """Stop at this boundary without saving."""
    CHECKPOINT_AND_STOP = 3
    """Save, wait until the shard is durable, stop."""
    EXIT = 4
    """The same, and the run has ended: a limit of its config is reached."""

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is written at the boundary."""
        return self in (Command.CHECKPOINT, Command.CHECKPOINT_AND_STOP, Command.EXIT)

    @property
    def stops(self) -> bool:
        """Whether the loop ends at the boundary."""
        return self in (Command.STOP, Command.CHECKPOINT_AND_STOP, Command.EXIT)


# The step's reduction is a sum, which cannot compute a maximum over ranks. So each command
# but CONTINUE has a slot that counts the ranks that received it.
_VOTED = (Command.CHECKPOINT, Command.STOP, Command.CHECKPOINT_AND_STOP, Command.EXIT)
NUM_VOTES = len(_VOTED) + 1
"""Numbers of one rank's vote in a step's reduction."""


def votes_for(command: Command, *, is_sending: bool = False) -> list[float]:
    """Returns one rank's votes: 1.0 in the slot of its command, 0.0 in the others.

    The last slot is 1.0 while the rank's last copy has not arrived at its partner.
    """
    return [*(float(command is voted) for voted in _VOTED), float(is_sending)]


def strongest_voted(counts: Sequence[float]) -> Command:
    """Returns the strongest command that any rank voted for.

    `counts` are `votes_for` of every rank, summed.
    """
    strongest = Command.CONTINUE
    # Slots are in ascending order of commands, so the last one with a vote wins.
    for command, count in zip(_VOTED, counts[:-1], strict=True):
        if count:
            strongest = command
    return strongest


_RANKS_OF_A_NUMBER = 48
"""Ranks that have a bit of one fp64 number, whose sums are exact below 2^53."""


def num_marks(num_ranks: int) -> int:
    """Returns how many numbers of a step's reduction have a bit for each rank."""
    return ceil(num_ranks / _RANKS_OF_A_NUMBER)


def mark_of(rank: int) -> tuple[int, float]:
    """Returns the index of the number with a rank's bit, and that bit."""
    index, bit = divmod(rank, _RANKS_OF_A_NUMBER)
    return index, 2.0**bit


def marked_ranks(marks: Sequence[float]) -> tuple[int, ...]:
    """Returns the ranks whose bits are set; `marks` are those of every rank, summed."""
    ranks = []
    for index, number in enumerate(marks):
        for bit in range(_RANKS_OF_A_NUMBER):
            if int(number) >> bit & 1:
                ranks.append(index * _RANKS_OF_A_NUMBER + bit)
    return tuple(ranks)


def all_sent(counts: Sequence[float]) -> bool:
    """Whether the last copy of every rank has arrived; `counts` as in `strongest_voted`."""
    return not counts[-1]


@dataclass(frozen=True)
class ProfileRequest:
    """Steps of which one rank writes a profile; others need not know of it."""

    first_step: int
    last_step: int
    number: int = 0
    """Number of the request within the run; 0 is that of its config."""

    def __str__(self) -> str:
        """Returns the steps as people write them, such as `10-12`."""
        if self.first_step == self.last_step:
            return str(self.first_step)
        return f"{self.first_step}-{self.last_step}"

    def folder(self, storage_path: str, attempt: int) -> str:
        """Returns where the ranks of an attempt write their files."""
        steps = f"steps-{self.first_step:08d}-{self.last_step:08d}"
        return f"{storage_path.rstrip('/')}/profiles/{steps}-a{attempt:04d}"
