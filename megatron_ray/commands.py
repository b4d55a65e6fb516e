"""Defines commands to a running training loop, and how all ranks agree on one.

Owns: the commands, their precedence, the form of a vote. Torch-free. Must not know: the
sender of a command.
"""

from collections.abc import Sequence
from enum import IntEnum


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


def votes_for(command: Command) -> list[float]:
    """Returns one rank's votes: 1.0 in the slot of its command, 0.0 in the others."""
    return [float(command is voted) for voted in _VOTED]


def strongest_voted(counts: Sequence[float]) -> Command:
    """Returns the strongest command that any rank voted for.

    `counts` are `votes_for` of every rank, summed.
    """
    strongest = Command.CONTINUE
    # Slots are in ascending order of commands, so the last one with a vote wins.
    for command, count in zip(_VOTED, counts, strict=True):
        if count:
            strongest = command
    return strongest
