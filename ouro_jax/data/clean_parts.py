"""The two things that many processes do in a cleaning: make fingerprints, write what is kept."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ouro_jax.data.clean_plan import Cleaning
from ouro_jax.data.corpus import BadRecords, Content, Span, read_records, texts_of
from ouro_jax.data.files import File
from ouro_jax.data.fingerprints import is_among, passage_hashes, signature, word_hashes
from ouro_jax.data.folder import Folder
from ouro_jax.data.readers import BrokenFile, Fields, JsonLines
from ouro_jax.data.workers import Advance
from ouro_jax.errors import ConfigError

UNFINISHED, SIGNATURES, DOCUMENTS = "unfinished", ".signatures", ".npz"
ADVANCE_BYTES = 1 << 20
# What becomes of a document, in the words of the report.
VERDICTS = ("kept", "empty", "contaminated", "exact_duplicates", "near_duplicates")
KEPT, EMPTY, CONTAMINATED, EXACT_DUPLICATE, NEAR_DUPLICATE = range(len(VERDICTS))
# Of every document: a hash of its text, its bytes, the number of its span, its verdict. Among
# 10^8 texts any two different ones have the same hash with a chance of 0.03 %.
DOCUMENT = np.dtype([("hash", "u8"), ("bytes", "u8"), ("span", "u4"), ("verdict", "u1")])


class Output(NamedTuple):
    """A file to write: its name, the spans of its input, and which documents these are."""

    name: str
    spans: tuple[Span, ...]
    first: int
    stop: int


def part_name(index: int, suffix: str) -> str:
    """Where a part's `SIGNATURES` or `DOCUMENTS` lie in the output folder."""
    return f"{UNFINISHED}/part-{index:05d}{suffix}"


def evaluation_passages(files: Sequence[File]) -> np.ndarray:
    """The hashes of the passages of all texts in the records of JSONL `files`, ascending.

    Every text at any depth of a record counts, each for itself. ConfigError naming file and line
    for broken JSON, and for a file without any word.
    """
    hashes = [np.zeros(0, np.uint64)]
    for file in files:
        found = [passage_hashes(word_hashes(text)) for text in _evaluation_texts(file)]
        if not sum(map(len, found)):
            raise ConfigError(f"{file.path}: there is no text in it to compare with.")
        hashes.append(np.unique(np.concatenate(found)))
    return np.unique(np.concatenate(hashes))


def _evaluation_texts(file: File) -> Iterator[str]:
    reader = JsonLines(Span(file.path, 0, 0, file.size), Fields(()))
    try:
        for number, raw in reader:
            try:
                record = reader.parse(raw)
            except ConfigError as error:
                raise ConfigError(f"{reader.place(number)}: {error}") from error
            yield from _texts_in(record)
    except BrokenFile as error:
        raise ConfigError(f"{file.path}: the file is cut off or damaged ({error}).") from error


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(item)


def write_fingerprints(
    cleaning: Cleaning, passages: np.ndarray, index: int, advance: Advance
) -> None:
    """Makes the fingerprints of one part: its signatures, then `documents`, `skipped` and `key`."""
    folder, bad = Folder(cleaning.output), BadRecords(cleaning.skip_bad)
    documents, unreported = [], 0
    with folder.writing(part_name(index, SIGNATURES)) as path, path.open("wb") as signatures:
        for number, span in enumerate(cleaning.parts[index]):
            for _, content in read_records([span], cleaning.corpus, bad):
                text = "\n".join(texts_of(content))
                data, hash_W = text.encode(), word_hashes(text)
                verdict = _verdict(content, hash_W, passages)
                documents.append((_hash(data), len(data), number, verdict))
                signatures.write(signature(hash_W).tobytes())
                unreported += len(data)
                if unreported >= ADVANCE_BYTES:
                    advance(unreported, 0)
                    unreported = 0
    advance(unreported, 0)
    with folder.writing(part_name(index, DOCUMENTS)) as path, path.open("wb") as file:
        np.savez(
            file,
            documents=np.array(documents, DOCUMENT),
            skipped=np.array(bad.places, np.str_),
            key=cleaning.part_key(index),
        )


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _question(content: Content) -> str:
    """What a conversation's user says first."""
    if isinstance(content, str):
        return ""
    return next((m["content"] for m in content if m["role"] == "user"), "")


def _verdict(content: Content, hash_W: np.ndarray, passages: np.ndarray) -> int:
    """The verdict on a document alone. A question counts by itself, as short ones have to."""
    if not "".join(texts_of(content)).strip():
        return EMPTY
    texts = hash_W, word_hashes(_question(content))
    contaminated = any(is_among(passage_hashes(text_W), passages) for text_W in texts)
    return CONTAMINATED if contaminated else KEPT


def write_kept(
    cleaning: Cleaning,
    pieces: Sequence[Sequence[Output]],
    is_kept_N: np.ndarray,
    piece: int,
    advance: Advance,
) -> None:
    """Writes the kept records of some files, with all their fields, as JSONL."""
    folder = Folder(cleaning.output)
    for output in pieces[piece]:
        is_kept = is_kept_N[output.first : output.stop].tolist()
        records = read_records(output.spans, cleaning.corpus, BadRecords(cleaning.skip_bad))
        count = 0
        with folder.writing(output.name) as path, path.open("wb") as file:
            for count, (record, _) in enumerate(records, 1):
                if count <= len(is_kept) and is_kept[count - 1]:
                    file.write(_line(record, output))
            if count != len(is_kept):
                raise ConfigError(
                    f"{output.spans[0].path} has changed since its fingerprints were made: repeat "
                    "the command."
                )
        advance(sum(span.size for span in output.spans), 0)


def _line(record: Mapping[str, Any], output: Output) -> bytes:
    try:
        line = json.dumps(record, ensure_ascii=False)
    except TypeError as error:
        raise ConfigError(
            f"{output.spans[0].path}: a record holds what JSON cannot hold ({error}). Drop or "
            "convert that column."
        ) from error
    # Half of a character pair goes back to the escape that it was read from.
    return line.encode("utf-8", "backslashreplace") + b"\n"
