"""What may be asked of a running loop.

Owns: the words and their order of strength. Must not know: who asks. Torch-free.
"""

from enum import IntEnum


class Command(IntEnum):
    """Agreed on by all ranks through the step's own reduction: the largest one wins, at
    the next step boundary.
    """

    CONTINUE = 0
    CHECKPOINT = 1
    """Save now and go on."""
    STOP = 2
    """End at this boundary without saving."""
    CHECKPOINT_AND_STOP = 3
    """Save, wait until the shard is durable, end."""
