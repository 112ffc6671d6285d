"""A user's own files to rows: find, read, tokenise, pack, write. Also a look at the result."""

import glob
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ouro_jax.config import ConfigError, nearest, require, require_choice
from ouro_jax.data.packing import pack
from ouro_jax.data.rows import DocumentCounts, Manifest, open_rows, write_rows
from ouro_jax.data.splits import in_split
from ouro_jax.data.tokenizer import load_tokenizer, tokenize, tokenizer_hash, train_tokenizer

FORMATS = ("jsonl", "text")
SPLITS = ("all", "train", "heldout")


def find_files(pattern: str) -> list[Path]:
    """The files that `pattern` matches (`**` goes into folders), sorted; ConfigError if none."""
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    files = [path for path in files if path.is_file()]
    require(bool(files), "input", pattern, "a path or a pattern that matches at least one file")
    return files


def read_texts(files: Iterable[Path], file_format: str, field: str = "text") -> Iterator[str]:
    """The documents of `files`: `jsonl` has one in `field` of every line, `text` one per file.

    Raises ConfigError naming file and line for broken JSON, a missing field, a field that is
    no text, bytes that are not UTF-8, and files that cannot be read.
    """
    require_choice(file_format, FORMATS, "format")
    for path in files:
        try:
            if file_format == "text":
                yield _decode(path.read_bytes(), path, 1)
            else:
                yield from _read_jsonl(path, field)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _read_record(_decode(line, path, number), field, f"{path}, line {number}")


def _read_record(line: str, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: broken JSON ({error.msg}, column {error.colno}).") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{place}: expected an object with the field {field!r}.")
    if field not in record:
        raise ConfigError(
            f"{place}: no field {field!r}; there are {', '.join(record) or 'none'}."
            f"{nearest(field, record)}"
        )
    if not isinstance(record[field], str):
        raise ConfigError(
            f"{place}: field {field!r} is no text but {type(record[field]).__name__}."
        )
    try:
        record[field].encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character pair: "\\ud800"
        raise ConfigError(f"{place}: field {field!r} is no valid Unicode ({error}).") from error
    return record[field]


def _decode(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise ConfigError(
            f"{path}, line {line}: not UTF-8 ({error.reason}). Convert the file to UTF-8."
        ) from error


def prepare(
    pattern: str,
    *,
    file_format: str,
    tokenizer: str | os.PathLike,
    sequence_length: int,
    output: str | os.PathLike,
    split: str = "all",
    field: str = "text",
) -> Manifest:
    """Writes the rows of all documents of the files that `pattern` matches to `output`.

    For training, `output` is `ROOT/<source>/<split>-<sequence_length>` and the tokenizer is
    `ROOT/tokenizer.json`. `split` keeps a part of the documents, chosen by a hash of their
    text: `heldout` about one in 20, `train` the others.
    """
    require(sequence_length >= 2, "sequence_length", sequence_length, "at least 2")
    require_choice(split, SPLITS, "split")
    texts = read_texts(find_files(pattern), file_format, field)
    if split != "all":
        texts = (text for text in texts if in_split(text, split))
    loaded, counts = load_tokenizer(tokenizer), DocumentCounts()
    return write_rows(
        output,
        pack(tokenize(loaded, texts, counts), sequence_length),
        sequence_length=sequence_length,
        vocab_size=loaded.get_vocab_size(),
        tokenizer_hash=tokenizer_hash(tokenizer),
        source=Path(output).absolute().parent.name,
        counts=counts,
    )


def prepare_tokenizer(
    pattern: str,
    *,
    file_format: str,
    vocab_size: int,
    output: str | os.PathLike,
    field: str = "text",
) -> Tokenizer:
    """Trains a byte-level BPE on the files that `pattern` matches and writes it to `output`."""
    output = Path(output)
    if output.exists():
        raise ConfigError(f"{output} exists already; data may depend on it. Choose another name.")
    tokenizer = train_tokenizer(read_texts(find_files(pattern), file_format, field), vocab_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}-{os.getpid()}")
    tokenizer.save(str(temporary))
    temporary.rename(output)
    return tokenizer


def describe_manifest(manifest: Manifest) -> str:
    """What a directory of rows holds, a line each."""
    fields = {
        "source": manifest.source,
        "rows": f"{manifest.rows:,} of {manifest.sequence_length:,} tokens ({manifest.dtype})",
        "tokens": f"{manifest.tokens:,}, padding {manifest.padding_share:.2%}",
        "documents": f"{manifest.documents:,}",
        "text": f"{manifest.text_bytes:,} bytes, "
        f"{manifest.text_bytes / manifest.tokens:.2f} a token",
        "vocabulary": f"{manifest.vocab_size:,} entries, tokenizer {manifest.tokenizer_hash[:12]}…",
        "loss mask": "stored" if manifest.has_loss_mask else "none: all tokens are learnt",
        "shards": f"{len(manifest.shards):,}",
    }
    return "\n".join(f"{name:<11} {value}" for name, value in fields.items())


def describe_rows(
    directory: str | os.PathLike, tokenizer: str | os.PathLike, num_rows: int
) -> Iterator[str]:
    """The first rows as text, a string each: documents numbered, tokens to learn in ‹ ›."""
    rows = open_rows(directory)
    if rows.manifest.tokenizer_hash != tokenizer_hash(tokenizer):
        raise ConfigError(f"{directory} was made with another tokenizer than {tokenizer}.")
    loaded = load_tokenizer(tokenizer)
    for index in range(min(num_rows, len(rows))):
        row = rows[index]
        parts, end = [], 0
        for number, length in enumerate(row.segment_lengths.tolist(), 1):
            document = slice(end, end + length)
            mask = None if row.loss_mask is None else row.loss_mask[document]
            parts.append(
                f"[{number}: {length}] {_decode_marked(loaded, row.tokens[document], mask)}"
            )
            end += length
        padding = rows.manifest.sequence_length - end
        yield "\n".join([f"row {index} ({padding} tokens of padding)", *parts])


def _decode_marked(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray | None) -> str:
    """The text of `tokens`, runs of masked ones in ‹ ›."""
    if mask is None:
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
    text = ""
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        part = tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False)
        text += f"‹{part}›" if mask[start] else part
    return text
