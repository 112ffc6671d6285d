"""Documents out of files: texts or conversations, in parts that can be read apart."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ouro_jax.data.chat import Message, question_messages, read_messages
from ouro_jax.data.files import File, open_file
from ouro_jax.data.readers import (
    ArrowRows,
    BrokenFile,
    Fields,
    JsonLines,
    NotUtf8,
    ParquetRows,
    Reader,
    Span,
    TextFile,
    row_group_sizes,
)
from ouro_jax.errors import ConfigError, nearest, require, require_choice

READERS: Mapping[str, type[Reader]] = {
    "jsonl": JsonLines,
    "text": TextFile,
    "parquet": ParquetRows,
    "datasets": ArrowRows,
}
FORMATS = tuple(READERS)
SCHEMAS = ("text", "messages", "question_answer")
# How much more text there is than bytes, by the end of the path: English text shrinks to a third
# under gzip and zstd, Parquet holds other columns besides. It balances parts, no more.
WEIGHTS = {".gz": 3, ".zst": 3, ".parquet": 2}

Content = str | list[Message]
"""What a document says: its text, or its messages."""


def texts_of(content: Content) -> list[str]:
    """The text of a document, or those of its messages."""
    return [content] if isinstance(content, str) else [message["content"] for message in content]


@dataclass(frozen=True)
class Corpus:
    """How files are to be read.

    `file_format`: `jsonl`, a record a line; `text`, a document a file; both also as `.gz` and
    `.zst`; `parquet`; `datasets`, a folder that `save_to_disk` of Hugging Face `datasets` wrote.
    `schema`: `text`, a record's `field` (default `text`); `messages`, the list of messages in its
    `field` (default `messages`); `question_answer`, its fields `question`, `answer` and, if it is
    there, `thought`.
    """

    file_format: str = "jsonl"
    schema: str = "text"
    field: str = ""

    def __post_init__(self) -> None:
        require_choice(self.file_format, FORMATS, "format")
        require_choice(self.schema, SCHEMAS, "schema")
        if self.file_format == "text":
            require(self.schema == "text", "schema", self.schema, "text: text files have no fields")
        if self.schema == "question_answer":
            expected = "none: question_answer reads question, thought and answer"
            require(not self.field, "field", self.field, expected)
        elif not self.field:
            object.__setattr__(self, "field", self.schema)

    @property
    def fields(self) -> Fields:
        """The fields that are read of a record."""
        if self.schema == "question_answer":
            return Fields(("question", "answer"), ("thought",))
        return Fields((self.field,))


class BadRecords:
    """Unreadable records that were left out: at most `limit`; `places` says where and why."""

    def __init__(self, limit: int):
        self.limit = limit
        self.places: list[str] = []

    @property
    def count(self) -> int:
        """How many were left out."""
        return len(self.places)

    def add(self, error: ConfigError) -> None:
        """Leaves out one more; raises `error` if that is more than the limit."""
        if self.count == self.limit:
            skipped = f" (skip_bad = {self.limit:,}, and as many were skipped before it.)"
            raise ConfigError(f"{error}{skipped if self.limit else ''}") from error
        self.places.append(str(error))


def plan_parts(files: Iterable[File], corpus: Corpus, part_bytes: int) -> list[tuple[Span, ...]]:
    """Cuts and groups `files` into parts of about `part_bytes`, in their order.

    Large files are cut where they can be read apart (plain JSONL anywhere, Parquet between row
    groups), small ones share a part. Depends on the arguments and, for large Parquet files, on
    their footers. ConfigError for folders that are no data set and Parquet without the columns.
    """
    if corpus.file_format == "datasets":
        files = _dataset_files(list(files))
    parts, part, weight = [], [], 0
    for span in itertools.chain.from_iterable(_cut(file, corpus, part_bytes) for file in files):
        if part and weight + span.size > part_bytes:
            parts.append(tuple(part))
            part, weight = [], 0
        part.append(span)
        weight += span.size
    return [*parts, tuple(part)] if part else parts


def _cut(file: File, corpus: Corpus, part_bytes: int) -> list[Span]:
    suffix = next((suffix for suffix in WEIGHTS if file.path.endswith(suffix)), "")
    weight = file.size * WEIGHTS.get(suffix, 1)
    pieces = -(-weight // part_bytes)
    if pieces > 1 and corpus.file_format == "parquet":
        return _cut_parquet(file.path, corpus.fields, weight, pieces)
    if pieces > 1 and corpus.file_format == "jsonl" and not suffix:
        borders = [file.size * piece // pieces for piece in range(pieces + 1)]
        return [Span(file.path, a, b, b - a) for a, b in itertools.pairwise(borders)]
    return [Span(file.path, 0, 0, weight)]


def _cut_parquet(path: str, fields: Fields, weight: int, pieces: int) -> list[Span]:
    """Neighbouring row groups together, by the piece of the file in which each begins."""
    sizes = row_group_sizes(path, fields)
    total = max(sum(sizes), 1)
    begins = itertools.accumulate(sizes, initial=0)
    piece_of = [begin * pieces // total for begin, _ in zip(begins, sizes, strict=False)]
    spans = []
    for _, group in itertools.groupby(range(len(sizes)), key=piece_of.__getitem__):
        members = list(group)
        share = sum(sizes[index] for index in members)
        spans.append(Span(path, members[0], members[-1] + 1, weight * share // total))
    return spans


def _dataset_files(files: Sequence[File]) -> list[File]:
    """The Arrow files of the data sets whose folders are among `files`, in their own order."""
    by_path = {file.path: file for file in files}
    for path in by_path:
        folder, _, name = path.rpartition("/")
        if name == "dataset_dict.json":
            splits = ", ".join(_read_json(path, "splits"))
            raise ConfigError(
                f"{folder}: a DatasetDict with the splits {splits}. Name the folder of one, as "
                f"{folder}/train."
            )
    states = [path for path in by_path if path.rpartition("/")[2] == "state.json"]
    if not states:
        raise ConfigError(
            f"{files[0].path}: there is no state.json beside it. The format datasets takes the "
            "folder that save_to_disk of Hugging Face datasets wrote."
        )
    found = []
    for state in states:
        for entry in _read_json(state, "_data_files") or []:
            name = entry.get("filename") if isinstance(entry, Mapping) else None
            path = f"{state.rpartition('/')[0]}/{name}"
            if path not in by_path:
                raise ConfigError(f"{path}: {state} names this file; it is missing.")
            found.append(by_path[path])
    return found


def _read_json(path: str, key: str) -> Any:
    with open_file(path) as file:
        try:
            return json.load(file)[key]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: no readable description of a data set ({error!r})."
            ) from error


def read_documents(spans: Iterable[Span], corpus: Corpus, bad: BadRecords) -> Iterator[Content]:
    """The documents of `spans`, in their order: texts, or conversations in the chat schemas.

    What cannot be read goes to `bad`, a ConfigError that names file and line or row: broken JSON,
    missing fields, values of another type, bytes that are not UTF-8. Of a file that is cut off or
    damaged what comes before is read, and the rest is one bad record. ConfigError at once for
    missing files, Parquet without the column and files that are not of the format.
    """
    return (content for _, content in _read(spans, corpus, corpus.fields, bad))


def read_records(
    spans: Iterable[Span], corpus: Corpus, bad: BadRecords
) -> Iterator[tuple[Mapping[str, Any], Content]]:
    """The same documents, each after the record that it is from, with all the record's fields."""
    return _read(spans, corpus, corpus.fields._replace(others=True), bad)


def _read(
    spans: Iterable[Span], corpus: Corpus, fields: Fields, bad: BadRecords
) -> Iterator[tuple[Mapping[str, Any], Content]]:
    for span in spans:
        reader = READERS[corpus.file_format](span, fields)
        last = None
        try:
            for last, raw in reader:
                try:
                    record = reader.parse(raw)
                    content = _content(record, corpus)
                except ConfigError as error:
                    number = last + (error.line if isinstance(error, NotUtf8) else 0)
                    bad.add(ConfigError(f"{reader.place(number)}: {error}"))
                else:
                    yield record, content
        except BrokenFile as error:
            place = reader.place(reader.first if last is None else last + 1)
            bad.add(ConfigError(f"{place}: the file is cut off or damaged here ({error})."))


def _content(record: Any, corpus: Corpus) -> Content:
    required, optional = corpus.fields[:2]
    if not isinstance(record, Mapping):
        raise ConfigError(f"expected an object with the field {required[0]!r}.")
    for name in required:
        if name not in record:
            raise ConfigError(
                f"no field {name!r}; there are {', '.join(record) or 'none'}."
                f"{nearest(name, record)}"
            )
    if corpus.schema == "text":
        return _text(record, corpus.field)
    if corpus.schema == "messages":
        messages = read_messages(record[corpus.field])
        for index, message in enumerate(messages):
            _check_unicode(message["content"], f"message {index}: content")
        return messages
    thoughts = [name for name in optional if record.get(name) is not None]
    texts = {name: _text(record, name) for name in (*required, *thoughts)}
    return question_messages(**texts)


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise ConfigError(f"field {name!r} is no text but {type(value).__name__}.")
    _check_unicode(value, f"field {name!r}")
    return value


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character pair: "\\ud800"
        raise ConfigError(f"{name} is no valid Unicode ({error}).") from error
