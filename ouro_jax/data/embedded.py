"""A small real data set without a download: prepared from what Python itself brings along.

Sources: `code` (the standard library), `prose` (its docstrings and help topics), `math`
(generated modular arithmetic) and `sft` (questions about the library, in ChatML, loss on the
answers). They take the same way as any other text: tokenizer, rows in ArrayRecord, mixture.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ouro_jax.data import arithmetic, stdlib_text
from ouro_jax.data.corpus import Corpus, texts_of
from ouro_jax.data.folder import rename_unless_there
from ouro_jax.data.prepare import plan_preparation, prepare
from ouro_jax.data.splits import in_split
from ouro_jax.data.tokenizer import train_tokenizer
from ouro_jax.errors import ConfigError, require_choice

SOURCES = ("code", "prose", "math", "sft")
SPLITS = ("train", "heldout")
HELDOUT_SHARE_OF_BYTES = 8  # held-out text is at most one part in so many of the byte limit
VERSION = 2  # raise it when the same settings give other rows than before

Documents = list[Any]  # texts; conversations (lists of messages) for sft


def build_embedded(
    root: str | os.PathLike,
    *,
    vocab_size: int,
    sequence_lengths: Mapping[str, Sequence[int]],
    max_bytes_per_source: int,
) -> Path:
    """Prepares the sources named in `sequence_lengths`, each with rows of those lengths.

    Returns the data root, a folder of `root` named by these settings and this Python: it holds
    `tokenizer.json` (trained on the train split, `vocab_size` entries), the texts as
    `raw/<source>/<split>.jsonl` and their rows `<source>/<split>-<length>/`. If it is there
    already nothing is done. Built aside and renamed, so it is whole whenever it is there; of two
    builders at once the first one wins.
    """
    for source in sequence_lengths:
        require_choice(source, SOURCES, "embedded data: source")
    settings = {
        "version": VERSION,
        "python": sys.version,
        "vocab_size": vocab_size,
        "sequence_lengths": {k: sorted(set(v)) for k, v in sorted(sequence_lengths.items())},
        "max_bytes_per_source": max_bytes_per_source,
    }
    text = json.dumps(settings, indent=1, sort_keys=True)
    final = Path(root) / f"embedded-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if final.is_dir():
        return final
    Path(root).mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".embedded-", dir=root))
    try:
        _build(temporary, vocab_size, settings["sequence_lengths"], max_bytes_per_source)
        (temporary / "settings.json").write_text(text + "\n")
        temporary.chmod(0o755)
        rename_unless_there(temporary, final)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return final


def _build(
    root: Path, vocab_size: int, sequence_lengths: Mapping[str, Sequence[int]], max_bytes: int
) -> None:
    documents = {
        (source, split): _documents(source, split, max_bytes)
        for source in sequence_lengths
        for split in SPLITS
    }
    training = (item for source in sequence_lengths for item in documents[source, "train"])
    texts = (text for document in training for text in texts_of(document))
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save(str(root / "tokenizer.json"))
    for (source, split), part in documents.items():
        _write(root, source, split, part, sequence_lengths[source])


def _documents(source: str, split: str, max_bytes: int) -> Documents:
    """The documents of a source's split, by file in hash order as far as the limit allows."""
    groups: Iterable[Documents]
    if source == "math":
        pairs = arithmetic.problems(seed=SPLITS.index(split))
        groups = ([text] for problem, text in pairs if in_split(problem, split))
    else:
        readers = {
            "code": stdlib_text.code,
            "prose": stdlib_text.prose,
            "sft": stdlib_text.questions,
        }
        groups = readers[source](split)
    limit = max_bytes if split == "train" else max_bytes // HELDOUT_SHARE_OF_BYTES
    taken = _take(groups, limit)
    if not taken:
        raise ConfigError(
            f"embedded data: {max_bytes:,} bytes per source leave no {split} text for {source!r}; "
            "allow more."
        )
    return taken


def _take(groups: Iterable[Documents], limit: int) -> Documents:
    """Whole groups that fit into `limit` bytes, until 95 % of it is used."""
    taken, used = [], 0
    for group in groups:
        size = sum(len(text.encode()) for document in group for text in texts_of(document))
        if used + size <= limit:
            taken += group
            used += size
        if used > 0.95 * limit:
            break
    return taken


def _write(
    root: Path, source: str, split: str, documents: Documents, lengths: Sequence[int]
) -> None:
    """The documents as a JSONL file under `raw`, and what `ouro data prepare` makes of it."""
    raw = root / "raw" / source / f"{split}.jsonl"
    schema = "messages" if source == "sft" else "text"
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.write_text(
        "".join(json.dumps({schema: document}) + "\n" for document in documents), "utf-8"
    )
    for length in lengths:
        preparation = plan_preparation(
            str(raw),
            tokenizer=root / "tokenizer.json",
            sequence_length=length,
            output=root / source / f"{split}-{length}",
            corpus=Corpus(schema=schema),
        )
        prepare(preparation)
