"""Prepares the data of a config, from sources to the manifest of token files.

Owns: the order of preparation, the rules of the split, the unigram baseline. Must not
know: jobs, ranks.

Every result is a cache entry named by a hash of its inputs, so a second run with the
same content reads a few small files, and a change of one source rebuilds that source
only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from megatron_ray.config.data import DataConfig, DataSource, source_names
from megatron_ray.config.model_tokenizer import ModelTokenizer
from megatron_ray.config.problem import Problem
from megatron_ray.data.preparation.built_corpora import BuiltCorpus, CorpusBuilder
from megatron_ray.data.preparation.corpora import Borders, ProgressCallback
from megatron_ray.data.preparation.data_files import SourceAt, find_data
from megatron_ray.data.preparation.errors import UnusableDataError, cause
from megatron_ray.data.preparation.formats.suffixes import file_format
from megatron_ray.data.preparation.given_tokenizer import check_rows
from megatron_ray.data.preparation.split import is_near_share
from megatron_ray.data.preparation.tokenizer_choice import make_tokenizer
from megatron_ray.data.prepared import PreparedCorpus, PreparedData
from megatron_ray.data.prepared_length import keep_length
from megatron_ray.data.tokenizer import Tokenizer
from megatron_ray.storage.location import parse_location

_DEFAULT_TEXT_KEY = DataSource.model_fields["text_key"].default


def no_progress(message: str) -> None:
    """Reports no progress."""


def prepare(
    data: DataConfig,
    cache: str,
    *,
    seq_length: int,
    progress: ProgressCallback = no_progress,
    weights: ModelTokenizer | None = None,
    rows: int | None = None,
) -> PreparedData:
    """Tokenizes data that `cache` (path or URI) lacks and returns the manifest.

    `weights` is the tokenizer of the weights that the run begins with, and `rows` the
    model's vocabulary, where they are known. `progress` receives short messages for
    users. Safe to run concurrently and to kill.

    Raises UnusableDataError for errors that the user can fix, at JSON pointers below
    /data (or /storage/path when the default cache cannot be written).
    """
    with _cache_errors(data, cache):
        location = parse_location(cache)
        data_files = find_data(data, weights)
        # All problems are reported at once, before anything is built.
        if data_files.problems:
            raise UnusableDataError(data_files.problems)
        made, tokenizer_file = make_tokenizer(
            data.tokenizer, weights, data_files.train, location, progress
        )
        # Tokenizing may take hours, so a model that is too small is refused before.
        check_rows(made.tokenizer, rows, weights)
        tokenizer = made.tokenizer
        builder = CorpusBuilder(location, cache, tokenizer, rows, progress)
        # Explicit validation sources replace the split.
        held_out_fraction = data.validation_fraction
        if data.validation:
            held_out_fraction = 0.0
        train = builder.build_all(data_files.train, held_out_fraction)
        # Plans know no tokenizer of weights.
        if weights is None:
            keep_length(location, data, data_files, _num_tokens(train))
        validation = builder.build_all(data_files.validation, None)
    # Checked last: the length is not part of a cache key, so that jobs with another
    # seq_length use the same tokens.
    required = seq_length + 1
    _require_length(train, "train", required)
    notes = [
        *made.notes,
        *data_files.notes,
        *_key_notes([*data_files.train, *data_files.validation]),
        *_special_token_notes(data, tokenizer),
        *_corpus_notes([*train, *validation], data, tokenizer),
    ]
    if data.separate_documents:
        _require_borders(train, tokenizer.end_of_document)
    if data.validation:
        _require_length(validation, "validation", required)
    elif held_out_fraction:
        validation, held_out_notes = _with_held_out(
            validation, train, held_out_fraction, required
        )
        notes += held_out_notes
    # A source may be both trained and evaluated on.
    notes = list(dict.fromkeys(notes))
    for note in notes:
        progress(note)
    return PreparedData(
        train=_manifests(train, "train"),
        validation=_manifests(validation, "validation"),
        tokenizer_path=f"{builder.cache_uri}/{tokenizer_file}",
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        begin_of_document=tokenizer.begin_of_document,
        rows_needed=tokenizer.rows_needed,
        unigram_nats=unigram_nats(_counts_by_weight(validation)),
        notes=tuple(notes),
        first_document=_first_document(train, tokenizer),
    )


def unigram_nats(blend: Sequence[tuple[float, npt.NDArray[np.int64]]]) -> float | None:
    """Returns the entropy in nats per token of a blend of (weight, token counts).

    It is the loss of a model that always predicts the tokens' frequencies. None for an
    empty blend.
    """
    if not blend:
        return None
    total_weight = 0.0
    # Averages frequencies, not counts, because a blend samples by weight, whatever the
    # sizes of its corpora.
    weighted = np.zeros(len(blend[0][1]))
    for weight, counts in blend:
        total_weight += weight
        weighted = weighted + weight * counts / counts.sum()
    frequencies = weighted / total_weight
    # 0 log 0 counts as 0.
    used = frequencies[frequencies > 0]
    # Adding zero turns the -0.0 of a single token into 0.0.
    return float(-(used * np.log(used)).sum()) + 0.0


def _first_document(train: Sequence[BuiltCorpus], tokenizer: Tokenizer) -> str:
    """Returns the beginning of the first training document with its tokens."""
    # Entries of earlier versions of this code have no such tokens.
    ids = train[0].first_tokens("train")
    if not ids:
        return ""
    return f"first document of {train[0].source.path}: {tokenizer.describe(ids)}"


def _num_tokens(train: Sequence[BuiltCorpus]) -> int:
    return sum(built.num_tokens("train") for built in train)


def _manifests(corpora: Sequence[BuiltCorpus], split: str) -> tuple[PreparedCorpus, ...]:
    names = source_names([built.source for built in corpora])
    manifests = []
    for built, name in zip(corpora, names, strict=True):
        manifests.append(built.manifest(split, name))
    return tuple(manifests)


def _counts_by_weight(
    corpora: Sequence[BuiltCorpus],
) -> list[tuple[float, npt.NDArray[np.int64]]]:
    return [(built.source.weight, built.read_counts()) for built in corpora]


def _require_length(corpora: Sequence[BuiltCorpus], split: str, required: int) -> None:
    problems = []
    for built in corpora:
        num_tokens = built.num_tokens(split)
        if num_tokens >= required:
            continue
        detail = (
            f"{built.source.path} has {num_tokens} {split} tokens, but one sample needs "
            f"seq_length + 1 = {required}; give more text or lower training.seq_length"
        )
        problems.append(Problem(f"{built.pointer}/path", "too_short", detail))
    if problems:
        raise UnusableDataError(problems)


def _corpus_notes(
    corpora: Sequence[BuiltCorpus], data: DataConfig, tokenizer: Tokenizer
) -> list[str]:
    """Returns notes on what was read and on the borders of documents."""
    notes: list[str] = []
    for built in corpora:
        notes.extend(built.record_notes())
    for built in corpora:
        borders = built.borders
        if borders is not None:
            path = built.source.path
            notes.extend(_end_notes(path, borders, data, tokenizer.end_of_document))
            notes.extend(_begin_notes(path, borders, tokenizer))
    return notes


def _key_notes(sources: Sequence[SourceAt]) -> list[str]:
    """Returns notes on sources that have no fields and name one."""
    notes = []
    for _, source_files in sources:
        source = source_files.source
        formats = {file_format(file.path) for file in source_files.files}
        has_fields = any(form is not None and form.has_fields for form in formats)
        if source.text_key != _DEFAULT_TEXT_KEY and not has_fields:
            notes.append(
                f"{source.path} has no fields, so text_key={source.text_key!r} has no effect"
            )
    return notes


def _special_token_notes(data: DataConfig, tokenizer: Tokenizer) -> Iterator[str]:
    if data.tokenizer.special_tokens_in_text == "all" and not tokenizer.recognises_special:
        yield (
            "data.tokenizer.special_tokens_in_text=all has no effect, as the tokenizer has no "
            "special tokens but its end token"
        )


def _end_notes(
    path: str, borders: Borders, data: DataConfig, end_of_document: int
) -> Iterator[str]:
    """Yields notes on prepared tokens that do not end as the tokenizer's documents."""
    last_token = None
    if borders.num_documents > 1 and borders.last_token != end_of_document:
        last_token = borders.last_token
    remedy = "if that is their end token, set data.tokenizer.end_of_document"
    if borders.num_end_tokens:
        if last_token is not None:
            yield (
                f"{path}: its documents end with token {last_token}, not with the end token "
                f"{end_of_document}: {remedy}"
            )
        return
    note = (
        f"{path} holds no end token {end_of_document}, so a model that is trained on it does "
        "not learn where documents end"
    )
    if data.separate_documents and not borders.can_be_separated:
        note += (
            ", and its index is of a single document, so separate_documents cannot see where "
            "they end"
        )
    if last_token is not None:
        note += f"; its documents end with token {last_token}: {remedy}"
    yield note


def _begin_notes(path: str, borders: Borders, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields notes on prepared tokens that do not begin as prompts will."""
    begin = tokenizer.begin_of_document
    first_token = borders.first_token
    if begin is not None:
        if first_token != begin:
            yield (
                f"{path}: not all its documents begin with token {begin}, as prompts will; "
                "prepare it again with that token, or set data.tokenizer.begin_of_document to "
                "an empty text"
            )
    elif (
        first_token is not None
        and borders.num_documents > 1
        and tokenizer.is_special(first_token)
    ):
        yield (
            f"{path}: its documents begin with token {first_token}, and prompts will not; set "
            f"data.tokenizer.begin_of_document to {tokenizer.name_of(first_token)!r}"
        )


def _require_borders(corpora: Sequence[BuiltCorpus], end_of_document: int) -> None:
    """Raises UnusableDataError when no source shows where documents begin or end."""
    paths = []
    for built in corpora:
        if built.borders is None or built.borders.can_be_separated:
            return
        paths.append(built.source.path)
    detail = (
        f"{', '.join(paths)} holds no end token {end_of_document}, and its index is of a "
        "single document, so separate_documents cannot see where documents end; name the "
        "end token of the data as data.tokenizer.end_of_document, prepare the data with an "
        "index of every document, or set separate_documents to false"
    )
    raise UnusableDataError([Problem("/data/separate_documents", "no_borders", detail)])


def _share_notes(train: Sequence[BuiltCorpus], fraction: float) -> list[str]:
    """Returns notes on sources of which another share is held out than was asked for."""
    notes = []
    for built in train:
        held_out = built.num_tokens("validation")
        share = held_out / (held_out + built.num_tokens("train"))
        if not is_near_share(share, fraction):
            notes.append(
                f"{built.source.path}: {share:.1%} of the tokens are held out instead of "
                f"{fraction:.1%}: whole texts, with all copies of each on one side, do not "
                "add up to it"
            )
    return notes


def _with_held_out(
    validation: Sequence[BuiltCorpus],
    train: Sequence[BuiltCorpus],
    fraction: float,
    required: int,
) -> tuple[list[BuiltCorpus], list[str]]:
    """Returns the corpora to evaluate on with those held out of `train`, and notes.

    Raises UnusableDataError.
    """
    held_out = [built for built in train if built.has("validation")]
    notes = _share_notes(held_out, fraction)
    long_enough, omissions = _long_enough([*validation, *held_out], required)
    return long_enough, notes + omissions


def _long_enough(
    train: Sequence[BuiltCorpus], required: int
) -> tuple[list[BuiltCorpus], list[str]]:
    """Returns the corpora with enough held-out tokens for a sample, and notes on others.

    Small corpora are left out of the evaluation, unless all are too small. Raises
    UnusableDataError.
    """
    long_enough = []
    notes = []
    most_tokens = 0
    for built in train:
        num_tokens = built.num_tokens("validation")
        most_tokens = max(most_tokens, num_tokens)
        if num_tokens >= required:
            long_enough.append(built)
        else:
            notes.append(
                f"{built.source.path}: {num_tokens} held-out tokens are too few to evaluate "
                "on"
            )
    if not long_enough:
        remedy = "lower training.seq_length"
        # Validation files stand in place of a share.
        if any(built.has("train") for built in train):
            remedy = f"raise validation_fraction, {remedy}"
        detail = (
            f"the held-out documents have {most_tokens} tokens, but one sample needs "
            f"seq_length + 1 = {required}; {remedy}, name data.validation sources, or set 0 "
            "to evaluate nothing"
        )
        raise UnusableDataError([Problem("/data/validation_fraction", "too_short", detail)])
    return long_enough, notes


@contextmanager
def _cache_errors(data: DataConfig, cache: str) -> Iterator[None]:
    """Converts errors of the cache's disk to UnusableDataError.

    Errors of sources and of the tokenizer already are UnusableDataError.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        pointer = "/data/cache"
        if data.cache is None:
            pointer = "/storage/path"
        detail = (
            f"prepared data cannot be kept in {cache}: {cause(error)}; give a folder that "
            "the job may write and that has room"
        )
        raise UnusableDataError([Problem(pointer, "not_writable", detail)]) from error
