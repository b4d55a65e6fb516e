"""Describes the tokenizer that a model was made with, as its files declare it.

Owns: which file declares the tokens around a document. Pure: takes the contents of files.
Must not know: where files are, how text becomes tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOKENIZER = "tokenizer.json"
TRAIN_STATE = "train_state.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
END_FILES = (
    TRAIN_STATE,
    "config.json",
    "generation_config.json",
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
)
"""Files beside a tokenizer.json that declare its end token; the first one counts.
train_state.json is that of a checkpoint of this library."""
OTHER_FORMS = (
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "qwen.tiktoken",
    "tiktoken.model",
)
"""Files with a tokenizer in a form that is not read here."""

Token = str | int
"""A token by its name or by its id."""
JsonObject = Mapping[str, Any]


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of given weights."""

    source: str
    """Path or URI of the weights: a checkpoint, or a folder in Hugging Face format."""
    content: str | None
    """Content of tokenizer.json; None when the weights come without one."""
    end_of_document: Token | None
    """Token that ends a document; None when no file declares one."""
    begin_of_document: Token | None
    """Token that begins a document, if any."""
    other_form: str | None = None
    """Name of a file with the tokenizer in another form, where tokenizer.json is
    missing."""
    is_of_run: bool = False
    """Whether the weights are a checkpoint of the run itself."""

    @property
    def path(self) -> str:
        """Path or URI of its tokenizer.json."""
        return f"{self.source.rstrip('/')}/{TOKENIZER}"

    def id_of(self, token: Token | None) -> int | None:
        """Returns the id of one of its tokens, if it is known."""
        if self.content is not None and isinstance(token, str):
            return token_ids(json.loads(self.content)).get(token)
        if isinstance(token, int):
            return token
        return None

    def rows_note(self, rows: int) -> str | None:
        """Returns a sentence for users when a model of `rows` tokens lacks some of its."""
        if self.content is None:
            return None
        names = {
            token_id: name for name, token_id in token_ids(json.loads(self.content)).items()
        }
        last = max(names, default=-1)
        if last < rows:
            return None
        return (
            f"the tokenizer has tokens up to {last} ({names[last]!r}) and the model {rows} "
            "rows: tokens without a row do no harm while no text contains them, and "
            f"model.vocab_size={last + 1} adds rows for them"
        )

    @property
    def remedy(self) -> str:
        """How to give a job this tokenizer, for messages."""
        if self.content is not None:
            return f"set data.tokenizer to {{kind: file, path: {self.path}}}"
        return (
            f"make a {TOKENIZER} with AutoTokenizer.from_pretrained(FOLDER)."
            "save_pretrained(FOLDER), FOLDER being the published one, and set "
            f"data.tokenizer to {{kind: file, path: FOLDER/{TOKENIZER}}}"
        )


def other_form(names: Sequence[str]) -> str | None:
    """Returns the first of a folder's files that is a tokenizer in another form."""
    for name in OTHER_FORMS:
        if name in names:
            return name
    return None


def token_ids(tokenizer: JsonObject) -> dict[str, int]:
    """Returns the ids of all tokens of a parsed tokenizer.json by name."""
    model = tokenizer.get("model") or {}
    vocabulary = model.get("vocab") or {}
    ids: dict[str, int] = {}
    if isinstance(vocabulary, Mapping):
        ids.update(vocabulary)
    else:
        # Unigram models list pairs of a piece and its score.
        for number, piece in enumerate(vocabulary):
            ids[piece[0]] = number
    for added in tokenizer.get("added_tokens") or ():
        ids[added["content"]] = added["id"]
    return ids


def declared_end(files: Mapping[str, JsonObject], ids: Mapping[str, int]) -> str | None:
    """Returns the end token that the parsed files of a model declare, by name of a file.

    A token that is not among `ids` is passed over: files may be left from another
    tokenizer.
    """
    names = {token_id: name for name, token_id in ids.items()}
    for token in end_candidates(files):
        if token in ids:
            return str(token)
        if token in names:
            return names[token]
    return None


def end_candidates(files: Mapping[str, JsonObject]) -> list[Token]:
    """Returns all declared end tokens, the first one first."""
    candidates: list[Token] = []
    for name in END_FILES:
        candidates += _end_tokens(files.get(name) or {})
    return candidates


def _end_tokens(values: JsonObject) -> list[Token]:
    """Returns the end tokens in one file; of several ids the first ends documents."""
    tokens: list[Token] = []
    for key in ("end_of_document", "eos_token_id"):
        value = values.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int):
            tokens.append(value)
    name = _content(values.get("eos_token"))
    if name is not None:
        tokens.append(name)
    return tokens


def declared_begin(tokenizer: JsonObject, files: Mapping[str, JsonObject]) -> str | None:
    """Returns the token that a published tokenizer puts before every text, if any.

    It is in the template of tokenizer.json. Some files lack the template and have
    `add_bos_token` in tokenizer_config.json, from which it was made when they were loaded.
    """
    begin = _template_begin(tokenizer.get("post_processor") or {})
    settings = files.get(TOKENIZER_CONFIG) or {}
    if begin is None and settings.get("add_bos_token"):
        special_tokens = files.get(SPECIAL_TOKENS) or {}
        begin = _content(settings.get("bos_token") or special_tokens.get("bos_token"))
    return begin


def _template_begin(processor: JsonObject) -> str | None:
    """Returns the single special token before the text in a post-processor."""
    if processor.get("type") == "Sequence":
        for part in processor.get("processors") or ():
            begin = _template_begin(part)
            if begin is not None:
                return begin
        return None
    if "cls" in processor:
        return str(processor["cls"][0])
    before = []
    for piece in processor.get("single") or ():
        if "Sequence" in piece:
            break
        before.append(str(piece["SpecialToken"]["id"]))
    if len(before) != 1:
        return None
    return before[0]


def with_begin(content: str, begin: int | None) -> str:
    """Returns a tokenizer.json that puts the token `begin` before every text, or none.

    `content` is returned as it is where it does so already.
    """
    tokenizer = json.loads(content)
    name = None
    for known, token_id in token_ids(tokenizer).items():
        if token_id == begin:
            name = known
    if _template_begin(tokenizer.get("post_processor") or {}) == name:
        return content
    tokenizer["post_processor"] = None
    if name is not None:
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": _begun(name, "A", 0),
            "pair": [*_begun(name, "A", 0), *_begun(name, "B", 1)],
            "special_tokens": {name: {"id": name, "ids": [begin], "tokens": [name]}},
        }
    return json.dumps(tokenizer, ensure_ascii=False)


def _begun(begin: str, sequence: str, type_id: int) -> list[dict[str, Any]]:
    return [
        {"SpecialToken": {"id": begin, "type_id": type_id}},
        {"Sequence": {"id": sequence, "type_id": type_id}},
    ]


def _content(token: object) -> str | None:
    """Returns the name of a token that is given as text or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    if isinstance(token, str) and token:
        return token
    return None
