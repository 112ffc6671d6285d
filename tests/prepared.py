"""Rows given by a test, written as a folder of prepared rows."""

import os
from collections.abc import Iterable

from ouro_jax.data.folder import Folder
from ouro_jax.data.rows import Manifest, Row, token_dtype, write_manifest, write_shard


def write_rows(
    directory: str | os.PathLike,
    rows: Iterable[Row],
    *,
    sequence_length: int,
    vocab_size: int,
    tokenizer_hash: str,
    source: str,
    documents: int = 0,
    text_bytes: int = 0,
    rows_per_shard: int = 1 << 20,
) -> Manifest:
    """Writes `rows` and their manifest to `directory`."""
    folder, rows = Folder(directory), list(rows)
    shards, tokens = [], 0
    for number, start in enumerate(range(0, len(rows), rows_per_shard)):
        name = f"rows-{number:05d}.array_record"
        members = rows[start : start + rows_per_shard]
        shard, count = write_shard(folder, name, members, sequence_length, vocab_size)
        assert shard is not None
        shards.append(shard)
        tokens += count
    manifest = Manifest(
        source=source,
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        tokenizer_hash=tokenizer_hash,
        dtype=token_dtype(vocab_size).name,
        has_loss_mask=rows[0].loss_mask is not None,
        documents=documents,
        text_bytes=text_bytes,
        truncated=0,
        dropped=0,
        skipped=0,
        tokens=tokens,
        rows=len(rows),
        inputs="",
        shards=tuple(shards),
    )
    write_manifest(folder, manifest)
    return manifest
