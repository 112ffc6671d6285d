"""A user's corpus to rows: read, tokenise, pack, write; in parts, on any number of workers.

A part is a fixed piece of the input and becomes one shard, made from that piece alone. So neither
workers nor kills nor the machines it runs on can change a byte: a repeated command makes the
shards that are missing. Their records lie in `unfinished/` until the manifest is written.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from tokenizers import Tokenizer

from ouro_jax.data.chat import Message, chat_documents
from ouro_jax.data.corpus import (
    BadRecords,
    Content,
    Corpus,
    Span,
    plan_parts,
    read_documents,
    texts_of,
)
from ouro_jax.data.files import find_files, modified
from ouro_jax.data.folder import TEMPORARY, Folder
from ouro_jax.data.packing import WINDOW_TOKENS, Document, pack
from ouro_jax.data.rows import (
    MANIFEST,
    DocumentCounts,
    Manifest,
    Shard,
    read_manifest,
    token_dtype,
    write_manifest,
    write_shard,
)
from ouro_jax.data.splits import in_split
from ouro_jax.data.tokenizer import (
    load_tokenizer,
    tokenize,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from ouro_jax.data.workers import Advance, run_pieces
from ouro_jax.errors import ConfigError, RunError, require, require_choice

SPLITS = ("all", "train", "heldout")
UNFINISHED, SKIPPED, SHARD_SUFFIX = "unfinished", "skipped.txt", ".array_record"
STARTED = f"{UNFINISHED}/started"
# 256 MiB of text: about 64M tokens, a shard of 128 MB, one or two minutes of one core.
SHARD_BYTES = 1 << 28
REPORT_TOKENS = 1 << 17


@dataclass(frozen=True)
class Preparation:
    """All that decides the bytes of a folder of rows, and `parts`: the input of every shard.

    `base` is the folder that all input lies in, `modified` when the newest file of each part was
    written (Unix seconds).
    """

    output: str
    tokenizer: str
    tokenizer_hash: str
    vocab_size: int
    sequence_length: int
    split: str
    corpus: Corpus
    skip_bad: int
    base: str
    parts: tuple[tuple[Span, ...], ...]
    modified: tuple[float, ...]

    def part_key(self, index: int) -> str:
        """A hash of what decides the bytes of a part, file contents and their folder aside."""
        spans = [
            (span.path.removeprefix(self.base), span.start, span.stop, span.size)
            for span in self.parts[index]
        ]
        corpus = dataclasses.astuple(self.corpus)
        settings = [self.tokenizer_hash, self.sequence_length, self.split, corpus, spans]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def inputs_key(self) -> str:
        """The same of the whole folder."""
        keys = (self.part_key(index) for index in range(len(self.parts)))
        return hashlib.sha256("".join(keys).encode()).hexdigest()

    def part_bytes(self, index: int) -> int:
        """Input bytes of a part."""
        return sum(span.size for span in self.parts[index])


@dataclass(frozen=True)
class Part:
    """What was made of one part: its shard (None without any document) and counts."""

    key: str
    modified: float
    shard: Shard | None
    tokens: int
    documents: int
    text_bytes: int
    truncated: int
    dropped: int
    skipped: tuple[str, ...]


@dataclass
class Progress:
    """How far a preparation is: input bytes (estimated within a part), shards, tokens.

    `tokens` are those made since the command was started.
    """

    total_bytes: int
    num_parts: int
    done_parts: int = 0
    tokens: int = 0
    _ended_bytes: int = 0
    _text_bytes: int = 0

    @property
    def done_bytes(self) -> int:
        """Input bytes of finished parts, and the text read of those at work."""
        return min(self.total_bytes, self._ended_bytes + max(0, self._text_bytes))

    def advance(self, text_bytes: int, tokens: int) -> None:
        """So much of the parts at work has been read."""
        self._text_bytes += text_bytes
        self.tokens += tokens

    def end_part(self, input_bytes: int, text_bytes: int) -> None:
        """A part has ended; `text_bytes` of it were reported before by `advance`."""
        self.done_parts += 1
        self._ended_bytes += input_bytes
        self._text_bytes -= text_bytes


def plan_preparation(
    pattern: str,
    *,
    tokenizer: str | os.PathLike,
    sequence_length: int,
    output: str | os.PathLike,
    corpus: Corpus,
    split: str = "all",
    shard_bytes: int = SHARD_BYTES,
    skip_bad: int = 0,
) -> Preparation:
    """Finds the files that `pattern` matches and cuts them into parts of about `shard_bytes`.

    For training, `output` is `ROOT/<source>/<split>-<sequence_length>` and the tokenizer is
    `ROOT/tokenizer.json`. `split` keeps a part of the documents, chosen by a hash of their
    text: `heldout` about one in 20, `train` the others. At most `skip_bad` unreadable records
    are left out; one more is a ConfigError.
    """
    most = WINDOW_TOKENS
    expected = f"2 to {most:,}"
    require(2 <= sequence_length <= most, "sequence_length", sequence_length, expected)
    require(shard_bytes >= 1, "shard_bytes", shard_bytes, "at least 1")
    require(skip_bad >= 0, "skip_bad", skip_bad, "0 or more")
    require_choice(split, SPLITS, "split")
    loaded = load_tokenizer(tokenizer)
    files = find_files(pattern)
    times = {file.path: file.modified for file in files}
    parts = tuple(tuple(spans) for spans in plan_parts(files, corpus, shard_bytes))
    return Preparation(
        output=os.fspath(output),
        tokenizer=os.fspath(tokenizer),
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=vocabulary_size(loaded),
        sequence_length=sequence_length,
        split=split,
        corpus=corpus,
        skip_bad=skip_bad,
        base=os.path.commonprefix([file.path for file in files]).rpartition("/")[0],
        parts=parts,
        modified=tuple(max(times[span.path] for span in spans) for spans in parts),
    )


def prepare(
    preparation: Preparation,
    workers: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Makes the shards that are not there yet on `workers` processes of this machine.

    One process lets the tokenizer use all cores; of several, each uses one. Does nothing if the
    folder is complete. Raises ConfigError for bad input and if the folder holds something else or
    has another writer, RunError if the disk is full or a worker dies; then finished shards stay.
    """
    with preparing(preparation) as manifest:
        return manifest or finish(preparation, _make_parts(preparation, workers, on_progress))


@contextlib.contextmanager
def preparing(preparation: Preparation) -> Iterator[Manifest | None]:
    """The only writer of a folder; yields its manifest if it is complete already, else None.

    If the block raises, finished shards are kept and a folder without any is removed.
    """
    folder = Folder(preparation.output)
    with folder.locked():
        if folder.has(MANIFEST):
            yield _complete(preparation, folder)
            return
        _begin(folder)
        try:
            yield None
        except BaseException as error:
            folder.remove_temporaries()
            kept = sum(name.endswith(".json") for name in folder.sizes(UNFINISHED))
            if not kept:
                _remove_unfinished(folder)
            elif isinstance(error, ConfigError | RunError):
                raise type(error)(
                    f"{error} ({kept:,} finished shards stay in {folder}: repeat the command.)"
                ) from error
            raise


def _begin(folder: Folder) -> None:
    """Marks the folder as a preparation's own; refuses one that holds anything else."""
    if not folder.sizes(UNFINISHED):
        files = {name for name in folder.sizes() if not name.startswith(TEMPORARY)}
        if files or set(folder.folders()) - {UNFINISHED}:
            raise ConfigError(f"{folder} exists already and holds no rows: choose another folder.")
        folder.write_text(STARTED, "Rows are being prepared here.\n")
    folder.remove_temporaries()


def _remove_unfinished(folder: Folder) -> None:
    for name in folder.sizes():
        if name.endswith(SHARD_SUFFIX):
            folder.remove(name)
    folder.remove(UNFINISHED)
    if not folder.sizes() and not folder.folders():
        folder.remove()


def _complete(preparation: Preparation, folder: Folder) -> Manifest:
    manifest = read_manifest(preparation.output)
    written = folder.modified(MANIFEST)
    if manifest.inputs != preparation.inputs_key() or max(preparation.modified) > written:
        raise ConfigError(
            f"{folder} exists already and holds rows of other input, of older files or of other "
            "settings: remove it or choose another folder."
        )
    if manifest.skipped > preparation.skip_bad:
        _check_skipped(preparation, folder.read_text(SKIPPED).splitlines())
    return manifest


def _make_parts(
    preparation: Preparation, workers: int, on_progress: Callable[[Progress], None] | None
) -> list[Part]:
    numbers = range(len(preparation.parts))
    sizes = [preparation.part_bytes(index) for index in numbers]
    progress = Progress(sum(sizes), len(sizes))
    parts = finished_parts(preparation)
    for index in parts:
        progress.end_part(sizes[index], 0)

    def advance(text_bytes: int, tokens: int) -> None:
        progress.advance(text_bytes, tokens)
        if on_progress:
            on_progress(progress)

    missing = [index for index in numbers if index not in parts]
    skipped = [place for part in parts.values() for place in part.skipped]
    _check_skipped(preparation, skipped)
    for index, part in run_pieces(
        functools.partial(write_part, preparation), missing, workers, advance
    ):
        parts[index] = part
        progress.end_part(sizes[index], part.text_bytes)
        advance(0, 0)
        skipped += part.skipped
        _check_skipped(preparation, skipped)
    return [parts[index] for index in numbers]


def _check_skipped(preparation: Preparation, skipped: Sequence[str]) -> None:
    if len(skipped) > preparation.skip_bad:
        raise ConfigError(
            f"{len(skipped):,} unreadable records, skip_bad = {preparation.skip_bad:,} allows no "
            f"more; the last: {skipped[-1]}"
        )


def finished_parts(preparation: Preparation) -> dict[int, Part]:
    """The parts that an earlier attempt has finished, of the same input and settings."""
    folder = Folder(preparation.output)
    records = folder.read_texts(UNFINISHED)
    shards = folder.sizes()
    parts = {}
    for index in range(len(preparation.parts)) if records else ():
        record = records.get(f"{_part_name(index)}.json")
        part = record and _read_part(preparation, index, record, lambda name: shards.get(name, -1))
        if part:
            parts[index] = part
    return parts


def _read_part(
    preparation: Preparation, index: int, record: str, size_of: Callable[[str], int]
) -> Part | None:
    """The part of a record, unless its input, settings or shard are no longer the same."""
    fields = json.loads(record)
    shard = fields.pop("shard")
    skipped = tuple(fields.pop("skipped"))
    part = Part(**fields, shard=Shard(**shard) if shard else None, skipped=skipped)
    same = (part.key, part.modified) == (preparation.part_key(index), preparation.modified[index])
    whole = part.shard is None or size_of(part.shard.name) == part.shard.bytes
    return part if same and whole else None


def _part_name(index: int) -> str:
    return f"rows-{index:05d}"


def write_part(preparation: Preparation, index: int, advance: Advance = lambda *_: None) -> Part:
    """Makes the shard of one part and then its record; both appear whole or not at all.

    Returns at once if an earlier attempt has made them. `advance` hears of text bytes and tokens.
    """
    folder, name = Folder(preparation.output), f"{UNFINISHED}/{_part_name(index)}.json"
    if folder.has(name):
        part = _read_part(preparation, index, folder.read_text(name), folder.size)
        if part:
            return part
    counts, bad = DocumentCounts(), BadRecords(preparation.skip_bad)
    documents = _documents(preparation, index, counts, bad)
    shard, tokens = write_shard(
        folder,
        _part_name(index) + SHARD_SUFFIX,
        pack(_reporting(documents, counts, advance), preparation.sequence_length),
        preparation.sequence_length,
        preparation.vocab_size,
    )
    _check_unchanged(preparation, index)
    part = Part(
        key=preparation.part_key(index),
        modified=preparation.modified[index],
        shard=shard,
        tokens=tokens,
        skipped=tuple(bad.places),
        **dataclasses.asdict(counts),
    )
    folder.write_text(name, json.dumps(dataclasses.asdict(part)))
    return part


def _check_unchanged(preparation: Preparation, index: int) -> None:
    """What was read is what was planned only if no file was written in between."""
    for path in dict.fromkeys(span.path for span in preparation.parts[index]):
        if modified(path) > preparation.modified[index]:
            raise ConfigError(f"{path} was written while it was read: repeat the command.")


def _documents(
    preparation: Preparation, index: int, counts: DocumentCounts, bad: BadRecords
) -> Iterator[Document]:
    tokenizer = _tokenizer(preparation.tokenizer, preparation.tokenizer_hash)
    contents = read_documents(preparation.parts[index], preparation.corpus, bad)
    if preparation.split != "all":
        contents = (item for item in contents if in_split(_spelt(item), preparation.split))
    if preparation.corpus.schema == "text":
        return tokenize(tokenizer, cast(Iterator[str], contents), counts)
    conversations = cast(Iterator[list[Message]], contents)
    return chat_documents(conversations, tokenizer, preparation.sequence_length, counts)


@functools.cache
def _tokenizer(path: str, expected_hash: str) -> Tokenizer:
    if tokenizer_hash(path) != expected_hash:
        raise ConfigError(f"{path} has changed since this preparation was started.")
    return load_tokenizer(path)


def _spelt(content: Content) -> str:
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True)


def _reporting(
    documents: Iterable[Document], counts: DocumentCounts, advance: Advance
) -> Iterator[Document]:
    tokens, text_bytes = 0, 0
    for document in documents:
        yield document
        tokens += len(document.tokens)
        if tokens >= REPORT_TOKENS:
            advance(counts.text_bytes - text_bytes, tokens)
            tokens, text_bytes = 0, counts.text_bytes
    advance(counts.text_bytes - text_bytes, tokens)


def finish(preparation: Preparation, parts: Sequence[Part]) -> Manifest:
    """Writes the manifest over all `parts`, in their order, and removes what is left over.

    What was skipped is listed in `skipped.txt`. ConfigError if more was skipped than `skip_bad`
    or if there are no rows.
    """
    skipped = [place for part in parts for place in part.skipped]
    _check_skipped(preparation, skipped)
    shards = tuple(part.shard for part in parts if part.shard is not None)
    folder = Folder(preparation.output)
    if not shards:
        folder.remove(UNFINISHED)
        raise ConfigError(
            f"{folder}: there is nothing to write: no document of this split has any text."
        )
    manifest = Manifest(
        source=folder.parent_name,
        sequence_length=preparation.sequence_length,
        vocab_size=preparation.vocab_size,
        tokenizer_hash=preparation.tokenizer_hash,
        dtype=token_dtype(preparation.vocab_size).name,
        has_loss_mask=preparation.corpus.schema != "text",
        documents=sum(part.documents for part in parts),
        text_bytes=sum(part.text_bytes for part in parts),
        truncated=sum(part.truncated for part in parts),
        dropped=sum(part.dropped for part in parts),
        skipped=len(skipped),
        tokens=sum(part.tokens for part in parts),
        rows=sum(shard.rows for shard in shards),
        inputs=preparation.inputs_key(),
        shards=shards,
    )
    for name in folder.sizes().keys() - {shard.name for shard in shards}:
        if name.endswith(SHARD_SUFFIX):
            folder.remove(name)  # of an earlier attempt with other input or settings
    if skipped:
        folder.write_text(SKIPPED, "\n".join(skipped) + "\n")
    write_manifest(folder, manifest)
    folder.remove(UNFINISHED)
    return manifest


def prepare_tokenizer(
    pattern: str, *, corpus: Corpus, vocab_size: int, output: str | os.PathLike
) -> Tokenizer:
    """Trains a byte-level BPE on the documents of `pattern`'s files and writes it to `output`."""
    directory, name = os.path.split(output)
    folder = Folder(directory or ".")
    if folder.has(name):
        raise ConfigError(f"{output} exists already; data may depend on it. Choose another name.")
    spans = [span for part in plan_parts(find_files(pattern), corpus, SHARD_BYTES) for span in part]
    contents = read_documents(spans, corpus, BadRecords(0))
    texts = (text for content in contents for text in texts_of(content))
    tokenizer = train_tokenizer(texts, vocab_size)
    with folder.writing(name) as temporary:
        tokenizer.save(str(temporary))
    return tokenizer
