"""Turns text into token ids and back.

Owns: training, loading and saving tokenizer.json; the tokens around a document. Must not
know: where text comes from.

All kinds are a Hugging Face `tokenizers` object, so other tools can read every saved
tokenizer. Names of special tokens inside a document are ordinary text unless the user
asks otherwise, so that a document cannot contain its own end token.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_ray.config.data import SpecialTokens
from megatron_ray.config.model_tokenizer import Token
from megatron_ray.exceptions import InputError

END_OF_DOCUMENT = "<|endoftext|>"
# Tried in this order if neither the config nor the tokenizer's files name an end token.
# Each family's own spelling: DeepSeek's has full-width bars and a low line of its own.
_USUAL_END_TOKENS = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|eot_id|>",
    "<|im_end|>",
    "[EOS]",
)
_MAX_PIECES_SHOWN = 16
_LOOK_UP_MODELS = ("Unigram", "WordLevel", "WordPiece")
"""Models that find words or pieces by name, unlike BPE, which merges characters."""
_UNUSED_CHARACTER = "\U0010ffff"


class TokenizerError(InputError, ValueError):
    """A tokenizer.json cannot be used; `field` is the config field to change."""

    def __init__(self, code: str, detail: str, field: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.field = field


def parse_tokenizer(text: str) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer of a tokenizer.json. Raises TokenizerError."""
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
    return inner


class Tokenizer:
    """Encodes and decodes text.

    `end_of_document` is the id that ends every document, `begin_of_document` the one that
    begins it, if any; `vocab_size` is the largest id plus one.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        end_of_document: int,
        begin_of_document: int | None = None,
        special_tokens_in_text: SpecialTokens = "none",
    ) -> None:
        """Wraps `inner` and changes its settings. Use the class methods."""
        # Published files may enable truncation and padding.
        inner.no_truncation()
        inner.no_padding()
        # The text `<|endoftext|>` inside a document is encoded as plain characters.
        inner.encode_special_tokens = True
        self._inner = inner
        self.end_of_document = end_of_document
        self.end_tokens = frozenset([end_of_document])
        """Tokens at which generation ends; a chat model may have several."""
        self.begin_of_document = begin_of_document
        self.special_tokens_in_text = special_tokens_in_text
        # Ids may have gaps; embeddings need rows up to the largest id.
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self._recognised = self._recognised_tokens()
        self._encoder = _with_recognised(inner, self._recognised)

    @property
    def identity(self) -> list[Any]:
        """JSON values that determine the tokens of every document."""
        # Without the settings that are off, so that entries of caches stay valid.
        parts: list[Any] = [self.to_json(), self.end_of_document]
        if self.begin_of_document is not None or self._encoder is not self._inner:
            parts += [self.begin_of_document, self._recognised]
        return parts

    @property
    def rows_needed(self) -> int:
        """Largest id that a document may contain, plus one.

        A special token that is added to the model's own vocabulary and is not recognised
        in text occurs only where it begins or ends a document.
        """
        ids = [self.end_of_document, *self._recognised.values()]
        if self.begin_of_document is not None:
            ids.append(self.begin_of_document)
        own = self._inner.get_vocab(with_added_tokens=False).values()
        return int(max(*ids, *own)) + 1

    def _recognised_tokens(self) -> dict[str, int]:
        """Returns the added tokens that are recognised in text, with their ids.

        Raises TokenizerError when a name of `special_tokens_in_text` is not one of them.
        """
        chosen = self.special_tokens_in_text
        names: tuple[str, ...] = ()
        if not isinstance(chosen, str):
            names = chosen
        added = self._inner.get_added_tokens_decoder()
        missing = set(names) - {token.content for token in added.values()}
        if missing:
            detail = (
                f"the tokenizer has no special token {min(missing)!r}; name those that it has, "
                "or use all"
            )
            raise TokenizerError("no_special_token", detail, "special_tokens_in_text")
        recognised = {}
        for token_id, token in added.items():
            # Added tokens that are not special are part of the text, such as HTML tags.
            is_recognised = chosen == "all" or not token.special
            if token_id == self.end_of_document:
                is_recognised = False
            if is_recognised or token.content in names:
                recognised[token.content] = token_id
        return recognised

    @classmethod
    def train_bpe(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
    ) -> Self:
        """Trains byte-level BPE of at most `vocab_size` tokens.

        `special_tokens` are added to the end token. Deterministic in the texts and their
        order.
        """
        inner = _byte_level(models.BPE())
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT, *special_tokens],
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
    def from_json(
        cls,
        text: str,
        end_of_document: Token | None = None,
        begin_of_document: Token | None = None,
        special_tokens_in_text: SpecialTokens = "none",
    ) -> Self:
        """Makes a tokenizer from the content of a tokenizer.json.

        Tokens are given by name or id; without an end token it is one of the usual names.
        Raises TokenizerError.
        """
        inner = parse_tokenizer(text)
        return cls.of(inner, end_of_document, begin_of_document, special_tokens_in_text)

    @classmethod
    def of(
        cls,
        inner: tokenizers.Tokenizer,
        end_of_document: Token | None = None,
        begin_of_document: Token | None = None,
        special_tokens_in_text: SpecialTokens = "none",
    ) -> Self:
        """Makes a tokenizer as `from_json` does, from a parsed tokenizer.json."""
        end = _end_token_id(inner, end_of_document)
        begin = None
        # An empty name stands for no token.
        if begin_of_document not in (None, ""):
            begin = _token_id(inner, begin_of_document, "begin")
        return cls(inner, end, begin, special_tokens_in_text)

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

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a text as the beginning of a document.

        They begin with `begin_of_document`. An empty text begins a new document; without
        a begin token it is what follows an end token.
        """
        ids = self.encode(text)
        if self.begin_of_document is not None:
            # The text may hold the token already, as rendered chats do.
            if ids[:1] != [self.begin_of_document]:
                ids = [self.begin_of_document, *ids]
        return ids or [self.end_of_document]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of many texts, computed on all cores."""
        encodable_texts = [_encodable(text) for text in texts]
        encodings = self._encoder.encode_batch_fast(
            encodable_texts, add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens by name.

        Invalid UTF-8, as at the end of a truncated text, becomes U+FFFD.
        """
        return str(self._inner.decode(list(ids), skip_special_tokens=False))

    def name_of(self, token_id: int) -> str | None:
        """Returns the name of a token, or None for an unknown id."""
        name: str | None = self._inner.id_to_token(token_id)
        return name

    @property
    def recognises_special(self) -> bool:
        """Whether there are special tokens that are recognised in text."""
        return any(self.is_special(token_id) for token_id in self._recognised.values())

    def is_special(self, token_id: int) -> bool:
        """Whether a token is one that text does not become by itself."""
        token = self._inner.get_added_tokens_decoder().get(token_id)
        return token is not None and bool(token.special)

    def describe(self, ids: Sequence[int]) -> str:
        """Returns the first ids with the text of each, for people to read."""
        pieces = []
        for token_id in ids[:_MAX_PIECES_SHOWN]:
            pieces.append(f"{token_id} {self.decode([token_id])!r}")
        if len(ids) > _MAX_PIECES_SHOWN:
            pieces.append("...")
        return ", ".join(pieces)


def _with_recognised(
    inner: tokenizers.Tokenizer, recognised: dict[str, int]
) -> tokenizers.Tokenizer:
    """Returns a tokenizer that recognises exactly these added tokens in text."""
    # The library skips special tokens in text, so that flag alone decides.
    is_same = True
    for token in inner.get_added_tokens_decoder().values():
        if token.special == (token.content in recognised):
            is_same = False
    # The most common case by far, in which a large file need not be parsed again.
    if is_same and isinstance(inner.model, models.BPE):
        return inner
    values: dict[str, Any] = json.loads(inner.to_str())
    hidden = _hide(values["model"], recognised, values["added_tokens"])
    if is_same and not hidden:
        return inner
    kept = []
    for added in values["added_tokens"]:
        if added["content"] not in hidden:
            kept.append(added | {"special": added["content"] not in recognised})
    values["added_tokens"] = kept
    changed = tokenizers.Tokenizer.from_str(json.dumps(values))
    changed.encode_special_tokens = True
    return changed


def _hide(
    model: dict[str, Any], recognised: dict[str, int], added_tokens: list[dict[str, Any]]
) -> set[str]:
    """Renames special tokens that a model of whole words or pieces would make of text.

    Those models look words up by name, `</s>` as any other. Ids stay. Returns the names.
    """
    if model["type"] not in _LOOK_UP_MODELS:
        return set()
    unrecognised = {added["content"] for added in added_tokens} - recognised.keys()
    # What stands for unknown words is no word of its own.
    unrecognised.discard(model.get("unk_token"))
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        hidden = {piece for piece, _ in vocabulary if piece in unrecognised}
        for pair in vocabulary:
            if pair[0] in hidden:
                pair[0] += _UNUSED_CHARACTER
        return hidden
    hidden = {name for name in vocabulary if name in unrecognised}
    for name in hidden:
        vocabulary[name + _UNUSED_CHARACTER] = vocabulary.pop(name)
    return hidden


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


def _token_id(inner: tokenizers.Tokenizer, token: Token, position: str) -> int:
    """Returns the id of the token that begins or ends (`position`) a document."""
    if isinstance(token, int):
        return token
    token_id = inner.token_to_id(token)
    if token_id is None:
        detail = f"the tokenizer has no token {token!r}; name the token that {position}s a document"
        raise TokenizerError(f"no_{position}_token", detail, f"{position}_of_document")
    return int(token_id)


def _end_token_id(inner: tokenizers.Tokenizer, token: Token | None) -> int:
    if token is not None:
        return _token_id(inner, token, "end")
    guess = _usual_end_token(inner)
    if guess is not None:
        return guess
    tried = ", ".join(_USUAL_END_TOKENS)
    detail = (
        f"the tokenizer has none of the usual end tokens ({tried}); set end_of_document to "
        "the one that ends a document"
    )
    raise TokenizerError("no_end_token", detail, "end_of_document")


def _usual_end_token(inner: tokenizers.Tokenizer) -> int | None:
    """Returns the first usual end token, a special one where there is any."""
    special = set()
    for added in inner.get_added_tokens_decoder().values():
        if added.special:
            special.add(added.content)
    # Vocabularies may hold `</s>` as an HTML tag beside their own end token.
    first_choice = [name for name in _USUAL_END_TOKENS if name in special]
    for name in (*first_choice, *_USUAL_END_TOKENS):
        token_id = inner.token_to_id(name)
        if token_id is not None:
            return int(token_id)
    return None
