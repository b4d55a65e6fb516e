"""Turns text into token ids and back.

Owns: training, loading and saving tokenizer.json. Must not know: where text comes from.

All kinds are a Hugging Face `tokenizers` object, so other tools can read every saved
tokenizer. Names of special tokens inside a document are ordinary text, so that a
document cannot contain its own end token.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_ray.exceptions import InputError

END_OF_DOCUMENT = "<|endoftext|>"
# Tried in this order if the config does not name an end token.
_USUAL_END_TOKENS = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
    "[EOS]",
    "<|end▁of▁sentence|>",
)


class TokenizerError(InputError, ValueError):
    """A tokenizer.json cannot be used; `field` is the config field to change."""

    def __init__(self, code: str, detail: str, field: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.field = field


class Tokenizer:
    """Encodes and decodes text.

    `end_of_document` is the id appended to every document, `vocab_size` the largest id
    plus one.
    """

    def __init__(self, inner: tokenizers.Tokenizer, end_of_document: int) -> None:
        """Wraps `inner` and changes its settings. Use the class methods."""
        # Published files may enable truncation and padding.
        inner.no_truncation()
        inner.no_padding()
        # The text `<|endoftext|>` inside a document is encoded as plain characters.
        inner.encode_special_tokens = True
        self._inner = inner
        self.end_of_document = end_of_document
        # Ids may have gaps; embeddings need rows up to the largest id.
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Trains byte-level BPE of at most `vocab_size` tokens.

        Deterministic in the texts and their order.
        """
        inner = _byte_level(models.BPE())
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            # Sorted, because the library returns the alphabet in arbitrary order.
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        )
        inner.train_from_iterator((_encodable(text) for text in texts), trainer)
        return cls(inner, _end_token_id(inner, END_OF_DOCUMENT))

    @classmethod
    def of_bytes(cls) -> Self:
        """Makes the tokenizer that maps bytes to ids; id 256 ends a document."""
        vocabulary = {}
        for byte, character in enumerate(_byte_characters()):
            vocabulary[character] = byte
        inner = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
        # Added after the 256 bytes, so its id is 256.
        inner.add_special_tokens([END_OF_DOCUMENT])
        return cls(inner, 256)

    @classmethod
    def from_json(cls, text: str, end_of_document: str | int | None = None) -> Self:
        """Makes a tokenizer from the content of a tokenizer.json.

        The end token is given by name or id, or else one of the usual names. Raises
        TokenizerError.
        """
        try:
            # Editors may put a byte order mark before it.
            inner = tokenizers.Tokenizer.from_str(text.removeprefix("\ufeff"))
        # The library raises plain Exception.
        except Exception as error:
            detail = (
                f"the file is not a Hugging Face tokenizer.json: {error}; save one with "
                "tokenizer.save() or save_pretrained()"
            )
            raise TokenizerError("bad_tokenizer", detail, "path") from error
        if not inner.get_vocab_size():
            raise TokenizerError(
                "bad_tokenizer", "the tokenizer.json has no tokens; train it first", "path"
            )
        if isinstance(end_of_document, int):
            return cls(inner, end_of_document)
        return cls(inner, _end_token_id(inner, end_of_document))

    @classmethod
    def load(cls, path: str | Path, end_of_document: str | int | None = None) -> Self:
        """Reads a local tokenizer.json. Raises OSError, TokenizerError."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"), end_of_document)

    def to_json(self) -> str:
        """Returns the content of a tokenizer.json."""
        return str(self._inner.to_str())

    def save(self, path: Path) -> None:
        """Writes tokenizer.json. Raises OSError."""
        path.write_text(self.to_json(), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens around it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of many texts, computed on all cores."""
        encodable_texts = [_encodable(text) for text in texts]
        encodings = self._inner.encode_batch_fast(encodable_texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens by name.

        Invalid UTF-8, as at the end of a truncated text, becomes U+FFFD.
        """
        return str(self._inner.decode(list(ids), skip_special_tokens=False))


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    # No space before the first word, so that decoding inverts encoding.
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _byte_characters() -> list[str]:
    """Returns the printable character of each byte in byte-level vocabularies (GPT-2).

    It is the byte's own, or the next unused from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    next_unused = 0x100
    characters = []
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(next_unused))
            next_unused += 1
    return characters


def _encodable(text: str) -> str:
    """Replaces lone surrogates, which JSON escapes may contain, by question marks.

    They cannot be encoded as UTF-8, so the library rejects them.
    """
    # The common case by far; it is cheap to detect and needs no copy.
    if text.isascii():
        return text
    return text.encode("utf-8", "replace").decode("utf-8")


def _end_token_id(inner: tokenizers.Tokenizer, name: str | None) -> int:
    if name is not None:
        token_id = inner.token_to_id(name)
        if token_id is None:
            detail = (
                f"the tokenizer has no token {name!r}; name the token that ends a document"
            )
            raise TokenizerError("no_end_token", detail, "end_of_document")
        return int(token_id)
    # Without a name, the first usual one in the vocabulary.
    for usual_name in _USUAL_END_TOKENS:
        token_id = inner.token_to_id(usual_name)
        if token_id is not None:
            return int(token_id)
    tried = ", ".join(_USUAL_END_TOKENS)
    detail = (
        f"the tokenizer has none of the usual end tokens ({tried}); set end_of_document to "
        "the one that ends a document"
    )
    raise TokenizerError("no_end_token", detail, "end_of_document")
