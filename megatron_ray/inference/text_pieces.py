"""Turns tokens into text piece by piece, as they are generated.

Must not know: models, sampling.
"""

from collections.abc import Sequence

from megatron_ray.data.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to."""
_CONTEXT = 8
"""Tokens of the prompt that are decoded with the first new one: whether a space belongs
between two tokens depends on both."""


class TextPieces:
    """The text of a growing list of tokens, without characters that may still change."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt[-_CONTEXT:])
        self._pending: list[int] = []
        self.text = ""
        """All pieces so far."""

    def add(self, token: int) -> str:
        """Adds a token; returns the text that is complete with it, perhaps none."""
        self._pending.append(token)
        # Decoded with the tokens before it, of which only the difference is new.
        before = self._tokenizer.decode(self._context)
        after = self._tokenizer.decode(self._context + self._pending)
        piece = after[len(before) :]
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        # The last piece is the next one's context, so the cost does not grow.
        self._context = self._pending
        self._pending = []
        self.text += piece
        return piece
