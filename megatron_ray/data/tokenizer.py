"""Text to token ids and back.

Owns: training, loading and saving tokenizer.json. Must not know: where text comes from.

All kinds are one Hugging Face `tokenizers` object, so every tokenizer can be saved and
opened by other tools. Names of special tokens inside a document are ordinary text: no
document can end itself.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_ray.exceptions import InputError

END_OF_DOCUMENT = "<|endoftext|>"
_USUAL_ENDS = (
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
    """A tokenizer.json that cannot be used; `code` and `field` say what to change."""

    def __init__(self, code: str, detail: str, field: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.field = field


class Tokenizer:
    """Encodes and decodes; `end_of_document` is the id appended to every document."""

    def __init__(self, inner: tokenizers.Tokenizer, end_of_document: int) -> None:
        """Takes over `inner`. Use the class methods."""
        # Files in the wild carry settings for other uses: cutting to a length, padding.
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        self.end_of_document = end_of_document
        # Ids may have holes; embeddings need room up to the largest.
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Byte-level BPE of at most `vocab_size` tokens; deterministic in the texts and
        their order.
        """
        inner = _byte_level(models.BPE())
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        )
        inner.train_from_iterator((_clean(text) for text in texts), trainer)
        return cls(inner, _find_end(inner, END_OF_DOCUMENT))

    @classmethod
    def of_bytes(cls) -> Self:
        """Token id = byte, and 256 ends a document."""
        inner = _byte_level(
            models.BPE(
                vocab={char: byte for byte, char in enumerate(_byte_characters())},
                merges=[],
            )
        )
        inner.add_special_tokens([END_OF_DOCUMENT])
        return cls(inner, 256)

    @classmethod
    def from_json(cls, text: str, end_of_document: str | int | None = None) -> Self:
        """From a tokenizer.json's content; the end token by name or id, or guessed from
        usual names. Raises TokenizerError.
        """
        try:
            inner = tokenizers.Tokenizer.from_str(text)
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
        return cls(
            inner,
            end_of_document
            if isinstance(end_of_document, int)
            else _find_end(inner, end_of_document),
        )

    @classmethod
    def load(cls, path: str | Path, end_of_document: str | int | None = None) -> Self:
        """From a local tokenizer.json. Raises OSError, TokenizerError."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"), end_of_document)

    def to_json(self) -> str:
        """Content of a tokenizer.json."""
        return str(self._inner.to_str())

    def save(self, path: Path) -> None:
        """Writes tokenizer.json. Raises OSError."""
        path.write_text(self.to_json(), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no marks are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        return [
            encoding.ids
            for encoding in self._inner.encode_batch_fast(
                [_clean(text) for text in texts], add_special_tokens=False
            )
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by name; bytes that are no UTF-8, as at a
        cut, become U+FFFD.
        """
        return str(self._inner.decode(list(ids), skip_special_tokens=False))


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies
    (GPT-2): itself, or the next from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _clean(text: str) -> str:
    """Half a surrogate pair, which JSON escapes can carry, has no UTF-8; it becomes a
    question mark.
    """
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _find_end(inner: tokenizers.Tokenizer, name: str | None) -> int:
    if name is not None:
        found = inner.token_to_id(name)
        if found is None:
            detail = (
                f"the tokenizer has no token {name!r}; name the token that ends a document"
            )
            raise TokenizerError("no_end_token", detail, "end_of_document")
        return int(found)
    for usual in _USUAL_ENDS:
        found = inner.token_to_id(usual)
        if found is not None:
            return int(found)
    tried = ", ".join(_USUAL_ENDS)
    detail = (
        f"the tokenizer has none of the usual end tokens ({tried}); set end_of_document to the "
        "one that ends a document"
    )
    raise TokenizerError("no_end_token", detail, "end_of_document")
