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
_TOKENIZER_FILES = (TOKENIZER_CONFIG, SPECIAL_TOKENS)
OTHER_FORMS = (
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tiktoken.model",
)
"""Files with a tokenizer in a form that is not read here, as are those with the suffix
below."""
TIKTOKEN = ".tiktoken"

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
    end_note: str | None = None
    """What a user may not expect of its end token, in a sentence."""
    begin_note: str | None = None
    """The same of its begin token."""
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
        if self.other_form is None:
            return (
                f"download the {TOKENIZER} that they were made with and set data.tokenizer to "
                f"{{kind: file, path: FOLDER/{TOKENIZER}}}, or to {{kind: bytes}} if they were "
                "made with bytes"
            )
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
    for name in names:
        if name.endswith(TIKTOKEN):
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


def declared_end(
    files: Mapping[str, JsonObject],
    ids: Mapping[str, int],
    tokenizer: JsonObject | None = None,
) -> str | None:
    """Returns the end token that the parsed files of a model declare, by name of a file.

    Of several the first ends documents. A token that is not among `ids` is passed over:
    files may be left from another tokenizer. Where no file declares one, it is the token
    that the template of a parsed tokenizer.json puts after every text.
    """
    for name in _names_of(end_candidates(files), ids):
        return name
    _, after = _tokens_around(tokenizer or {})
    if len(after) == 1 and after[0] in ids:
        return after[0]
    return None


def end_candidates(files: Mapping[str, JsonObject]) -> list[Token]:
    """Returns all declared end tokens, the first one first."""
    candidates: list[Token] = []
    for name in END_FILES:
        candidates += _end_tokens(files.get(name) or {})
    return candidates


def end_note(files: Mapping[str, JsonObject], ids: Mapping[str, int]) -> str | None:
    """Returns a sentence when the files of a model contradict each other on its end."""
    of_model = dict(files)
    of_tokenizer = {}
    for name in _TOKENIZER_FILES:
        of_tokenizer[name] = of_model.pop(name, {})
    # A model may have further end tokens, such as that of a turn in a chat.
    declared = _names_of(end_candidates(of_model), ids)
    other = declared_end(of_tokenizer, ids)
    if not declared or other is None or other in declared:
        return None
    return (
        f"the model's files name {declared[0]!r} as its end token, and those of its "
        f"tokenizer {other!r}: documents end with {declared[0]!r}; set "
        "data.tokenizer.end_of_document to end them with another token"
    )


def _names_of(tokens: Sequence[Token], ids: Mapping[str, int]) -> list[str]:
    """Returns those tokens that are among `ids`, by name."""
    by_id = {token_id: name for name, token_id in ids.items()}
    names = []
    for token in tokens:
        name = token
        if isinstance(token, int):
            name = by_id.get(token, "")
        if name in ids:
            names.append(str(name))
    return names


def _end_tokens(values: JsonObject) -> list[Token]:
    """Returns the end tokens in one file, the first one first."""
    tokens: list[Token] = []
    for key in ("end_of_document", "eos_token_id"):
        value = values.get(key)
        if not isinstance(value, list):
            value = [value]
        tokens += [token for token in value if isinstance(token, int)]
    name = _content(values.get("eos_token"))
    if name is not None:
        tokens.append(name)
    return tokens


def declared_begin(tokenizer: JsonObject, files: Mapping[str, JsonObject]) -> str | None:
    """Returns the token that a published tokenizer puts before every text, if any.

    It is in the template of tokenizer.json. Some files lack the template and have
    `add_bos_token` in tokenizer_config.json, from which it was made when they were loaded.
    """
    begin = _template_begin(tokenizer)
    settings = files.get(TOKENIZER_CONFIG) or {}
    if begin is None and settings.get("add_bos_token"):
        special_tokens = files.get(SPECIAL_TOKENS) or {}
        begin = _content(settings.get("bos_token") or special_tokens.get("bos_token"))
    return begin


def begin_note(tokenizer: JsonObject) -> str | None:
    """Returns a sentence when a parsed tokenizer.json begins texts as no run can."""
    before, _ = _tokens_around(tokenizer)
    if len(before) < 2:
        return None
    return (
        f"the tokenizer puts {len(before)} tokens before every text ({', '.join(before)}), and "
        "documents can begin with one: they begin with none; name one as "
        "data.tokenizer.begin_of_document, or write the others into the text"
    )


def _template_begin(tokenizer: JsonObject) -> str | None:
    """Returns the single special token that a tokenizer.json puts before a text."""
    before, _ = _tokens_around(tokenizer)
    if len(before) != 1:
        return None
    return before[0]


def _tokens_around(tokenizer: JsonObject) -> tuple[list[str], list[str]]:
    """Returns the special tokens that a tokenizer.json puts before and after a text."""
    processor = tokenizer.get("post_processor") or {}
    before: list[str] = []
    after: list[str] = []
    for part in processor.get("processors") or [processor]:
        if "cls" in part:
            before.insert(0, str(part["cls"][0]))
            after.append(str(part["sep"][0]))
        # Each part puts its tokens around what the parts before it have made.
        pieces = part.get("single") or ()
        text = _place_of_text(pieces)
        before = [*_special_tokens(pieces[:text]), *before]
        after += _special_tokens(pieces[text:])
    return before, after


def _place_of_text(pieces: Sequence[JsonObject]) -> int:
    for place, piece in enumerate(pieces):
        if "Sequence" in piece:
            return place
    return len(pieces)


def _special_tokens(pieces: Sequence[JsonObject]) -> list[str]:
    return [str(piece["SpecialToken"]["id"]) for piece in pieces if "Sequence" not in piece]


def with_begin(content: str, begin: int | None) -> str:
    """Returns a tokenizer.json that puts the token `begin` before every text, or none.

    `content` is returned as it is where it does so already.
    """
    tokenizer = json.loads(content)
    name = None
    for known, token_id in token_ids(tokenizer).items():
        if token_id == begin:
            name = known
    if _template_begin(tokenizer) == name:
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
