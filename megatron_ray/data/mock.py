"""Makes text of random words, for runs that measure a cluster and need no data.

Owns: what the text is, the same on every machine. Pure. Must not know: tokens, files.
"""

import random
import string
from collections.abc import Iterator
from itertools import accumulate

NUM_PARTS = 8
PART_BYTES = 1 << 19
_NUM_WORDS = 4096
_MAX_LETTERS = 9
_MAX_DOCUMENT_WORDS = 2000


def mock_documents(part: int) -> Iterator[str]:
    """Yields the documents of a part, `PART_BYTES` bytes of ASCII together.

    Words are as unequally frequent as in a language (Zipf's law).
    """
    words = _words()
    cumulative = list(accumulate(1 / rank for rank in range(1, _NUM_WORDS + 1)))
    generator = random.Random(part)
    missing = PART_BYTES
    while missing:
        length = generator.randint(1, _MAX_DOCUMENT_WORDS)
        text = " ".join(generator.choices(words, cum_weights=cumulative, k=length))[
            :missing
        ]
        missing -= len(text)
        yield text


def _words() -> list[str]:
    generator = random.Random("words")
    words = []
    for _ in range(_NUM_WORDS):
        letters = generator.choices(
            string.ascii_lowercase, k=generator.randint(1, _MAX_LETTERS)
        )
        words.append("".join(letters))
    return words
