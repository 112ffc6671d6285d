"""Rows on disk: what is written is read, nothing half-written is seen, damage is named."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prepared import write_rows

from ouro_jax.data.folder import Folder
from ouro_jax.data.rows import (
    Row,
    open_rows,
    read_manifest,
    verify_rows,
    write_shard,
)
from ouro_jax.errors import ConfigError

LENGTH = 12


def random_rows(count: int, vocab_size: int, masked: bool) -> list[Row]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        lengths = rng.integers(1, 5, 3).astype(np.uint32)
        mask = rng.random(LENGTH) < 0.5 if masked else None
        rows.append(Row(rng.integers(0, vocab_size, LENGTH), lengths, mask))
    return rows


def write(directory, rows, vocab_size=300, **options):
    return write_rows(
        directory,
        rows,
        sequence_length=LENGTH,
        vocab_size=vocab_size,
        tokenizer_hash="abc",
        source="tests",
        documents=7,
        text_bytes=99,
        **options,
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_rows_come_back_as_written_from_several_shards(tmp_path, masked, vocab_size, dtype):
    rows = random_rows(50, vocab_size, masked)
    written = write(tmp_path / "rows", rows, vocab_size, rows_per_shard=16)
    source = open_rows(tmp_path / "rows")
    assert source.manifest == written == verify_rows(tmp_path / "rows")
    assert [shard.rows for shard in written.shards] == [16, 16, 16, 2]
    assert (written.dtype, written.has_loss_mask) == (dtype, masked)
    assert written.tokens == sum(int(row.segment_lengths.sum()) for row in rows)
    assert (written.documents, written.text_bytes, written.rows) == (7, 99, len(source))
    for row, read in zip(rows, source, strict=True):
        np.testing.assert_array_equal(read.tokens, row.tokens)
        np.testing.assert_array_equal(read.segment_lengths, row.segment_lengths)
        np.testing.assert_equal(read.loss_mask, row.loss_mask)


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = random_rows(50, 300, True)
    assert write(tmp_path / "a", rows) == write(tmp_path / "b", rows)


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    def broken():
        yield from random_rows(3, 300, False)
        raise ValueError("broken JSON")

    with pytest.raises(ValueError, match="broken JSON"):
        write_shard(Folder(tmp_path), "rows", broken(), LENGTH, 300)
    assert list(tmp_path.iterdir()) == []


def test_no_rows_make_no_shard(tmp_path):
    assert write_shard(Folder(tmp_path), "rows", [], LENGTH, 300) == (None, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    # Limits the size of files in a process of its own: the disk takes 64 KiB.
    program = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(Path(__file__).parents[1])!r}]
from test_rows import LENGTH, Folder, random_rows, write_shard
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
write_shard(Folder({str(tmp_path)!r}), "rows", random_rows(9000, 65_536, False), LENGTH, 65_536)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "RunError: " in run.stderr
    assert f"{tmp_path}/rows: cannot be written" in run.stderr
    assert "File too large" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_rows_that_cannot_be_stored_are_refused(tmp_path):
    row = random_rows(1, 300, False)[0]
    with pytest.raises(ConfigError, match="row 1: token id 300 is beyond the vocabulary of 300"):
        write(tmp_path / "rows", [row, row._replace(tokens=np.full(LENGTH, 300))])
    with pytest.raises(ValueError, match="shape"):
        write(tmp_path / "rows", [row._replace(tokens=row.tokens[1:])])


def test_rows_in_object_storage_are_written_and_found(tmp_path):
    rows = random_rows(40, 300, True)
    local = write(tmp_path / "rows", rows, rows_per_shard=16)
    remote = write("memory://bucket/rows", rows, rows_per_shard=16)
    assert remote == local == read_manifest("memory://bucket/rows")
    assert Folder("memory://bucket/rows").sizes() == Folder(tmp_path / "rows").sizes()


def test_missing_and_damaged_parts_are_named(tmp_path):
    directory = tmp_path / "rows"
    with pytest.raises(ConfigError, match="no such folder"):
        open_rows(directory)
    write(directory, random_rows(20, 300, False))
    shard = directory / "rows-00000.array_record"
    content = shard.read_bytes()

    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 1
    shard.write_bytes(flipped)
    source = open_rows(directory)  # opening reads no contents
    with pytest.raises(ConfigError, match="rows-00000.array_record, record [0-9]+: cannot be read"):
        list(source)
    with pytest.raises(ConfigError, match="rows-00000.array_record: the checksum differs"):
        verify_rows(directory)
    shard.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match="rows-00000.array_record.*cut short"):
        open_rows(directory)
    shard.unlink()
    with pytest.raises(ConfigError, match="rows-00000.array_record.*missing"):
        open_rows(directory)


def test_a_manifest_that_is_not_ours_is_refused(tmp_path):
    directory = tmp_path / "rows"
    write(directory, random_rows(3, 300, False))
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for text in (
        "{",
        "[]",
        json.dumps({**manifest, "format": "another"}),
        json.dumps({k: v for k, v in manifest.items() if k != "rows"}),
        json.dumps({**manifest, "surplus": 1}),
        json.dumps({**manifest, "tokens": "abc"}),
        json.dumps({**manifest, "tokens": 0}),
        json.dumps({**manifest, "rows": 0, "tokens": 0, "shards": []}),
        json.dumps({**manifest, "shards": [{**manifest["shards"][0], "rows": "a"}]}),
        json.dumps({**manifest, "dtype": "uint32"}),
        json.dumps({**manifest, "vocab_size": 70_000}),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match="manifest.json: not a readable manifest"):
            read_manifest(directory)
    path.unlink()
    with pytest.raises(ConfigError, match="no manifest.json: .* unfinished"):
        read_manifest(directory)


def test_shards_that_do_not_fit_the_manifest_are_named(tmp_path):
    directory = tmp_path / "rows"
    write(directory, random_rows(3, 300, False))
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "shards": []}))
    assert read_manifest(directory).rows == 3  # enough for what only counts
    with pytest.raises(ConfigError, match="its shards hold 0 rows, not 3"):
        open_rows(directory)
    for change in ({"sequence_length": 11}, {"has_loss_mask": True}):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(ConfigError, match="record 0 does not fit the manifest"):
            verify_rows(directory)


def test_verify_counts_what_the_manifest_claims(tmp_path):
    directory = tmp_path / "rows"
    write(directory, random_rows(3, 300, False))
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "tokens": manifest["tokens"] + 1}))
    with pytest.raises(ConfigError, match="25 tokens, the manifest says 26"):
        verify_rows(directory)
    path.write_text(json.dumps({**manifest, "vocab_size": 10}))
    with pytest.raises(ConfigError, match="array_record, record 0 does not fit the manifest"):
        verify_rows(directory)
