"""Words that messages share.

Pure. Must not know: what a message is about.
"""


def counted(number: int, noun: str) -> str:
    """Returns a number of things, such as `1 rank` or `2,048 ranks`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}s"
