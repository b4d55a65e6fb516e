"""Text comes in pieces that together are the whole."""

from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.inference.text_pieces import TextPieces


def pieces_of(tokenizer: Tokenizer, prompt: str, text: str) -> list[str]:
    start = tokenizer.encode(prompt)
    tokens = tokenizer.encode(prompt + text)[len(start) :]
    stream = TextPieces(tokenizer, start)
    pieces = [stream.add(token) for token in tokens]
    assert stream.text == "".join(pieces)
    return pieces


def test_a_character_of_several_bytes_comes_when_it_is_complete() -> None:
    pieces = pieces_of(Tokenizer.of_bytes(), "a", "b\u00e9\u4e2d!")
    assert pieces == ["b", "", "\u00e9", "", "", "\u4e2d", "!"]


def test_a_long_text_is_whole() -> None:
    text = " to be, or not to be; \u00fcber alles \U0001f600 " * 20
    assert "".join(pieces_of(Tokenizer.of_bytes(), "", text)) == text
