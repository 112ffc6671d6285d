"""Packed batches per second and core, beside what a v5p host consumes; and very many shards.

    python -m benchmarks.data_iterator [--seconds=5] [--shards=100000]

Rows of three sources are written, mixed and read as batches of one host (2^17 tokens: 8M tokens
over 64 hosts), with the process pinned to one core. The rate is tokens per second of processor
time, so that other work on the machine counts little; `wall` is by the clock. They are compared
with a host of 4 v5p chips that trains Ouro 1.4B at 55 % of its 459 TFLOP/s (4 loops; stable_1a
with 8 loops consumes half). Goal: 20 × that on one core.

Then a source of so many shards (hard links to a few, in the page cache): opening it, and single
rows from anywhere, where nearly every one is in a shard that is not open.
"""

import contextlib
import itertools
import json
import os
import runpy
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.measure import shown
from ouro_jax.data.folder import Folder
from ouro_jax.data.mixture import Mixture, open_mixture
from ouro_jax.data.rows import Manifest, Row, Shard, write_manifest, write_shard
from ouro_jax.data.tokenizer import tokenizer_hash
from ouro_jax.model.flops import train_flops_per_token
from ouro_jax.parallel.chips import CHIPS

LENGTHS = (4096, 16_384, 65_536)
WEIGHTS = {"web": 0.7, "code": 0.2, "math": 0.1}
SOURCE_TOKENS = 1 << 24
HOST_BATCH_TOKENS = 1 << 17
MEAN_DOCUMENT = 1000
VOCAB_SIZE = 49_152
CHIPS_PER_HOST, SHARE_OF_PEAK = 4, 0.55

_SECONDS = flags.DEFINE_float("seconds", 5.0, "How long to read rows of each length.")
_SHARDS = flags.DEFINE_integer("shards", 100_000, "Shards of the source that has many.", 1)


def main(_) -> None:
    """Prints a table, the many shards, and the same as one JSON line last."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "tokenizer.json").write_text("{}")
        rows = [measure(root, length, _SECONDS.value) for length in LENGTHS]
        many = many_shards(root, _SHARDS.value)
    for name in rows[0]:
        print(f"{name:30s}" + "".join(f"{shown(row[name]):>14s}" for row in rows))
    for name, value in many.items():
        print(f"{name:30s}{shown(value):>14s}")
    print(json.dumps({"lengths": rows, "many_shards": many}))


def consumption(sequence_length: int) -> float:
    """Tokens per second that a v5p host trains."""
    path = Path(__file__).parents[1] / "configs" / "ouro_1p4b.py"
    model = runpy.run_path(str(path))["get_model"](24)
    flops = train_flops_per_token(model, sequence_length)
    return CHIPS_PER_HOST * SHARE_OF_PEAK * CHIPS["v5p"].peak_flops / flops


def measure(root: Path, length: int, seconds: float) -> dict[str, float]:
    """Rates of batches with rows of `length` tokens, all of them in the page cache."""
    for source in WEIGHTS:
        folder = Folder(root / source / f"train-{length}")
        rows = make_rows(length, SOURCE_TOKENS // length)
        shard, tokens = write_shard(folder, "rows-00000.array_record", rows, length, VOCAB_SIZE)
        assert shard is not None
        write_manifest(folder, manifest_of(root, source, length, tokens, (shard,)))
    mixture = open_mixture(root, WEIGHTS, sequence_length=length, seed=0)
    read(mixture, length, 0.2)
    tokens, processor, wall = read(mixture, length, seconds)
    used = consumption(length)
    return {
        "row length": length,
        "tokens/s and core": tokens / processor,
        "tokens/s, wall": tokens / wall,
        "a v5p host trains, tokens/s": used,
        "ratio": tokens / processor / used,
        "ratio, wall": tokens / wall / used,
    }


def read(mixture: Mixture, length: int, seconds: float) -> tuple[int, float, float]:
    """Tokens delivered in so many seconds, the processor's time and the clock's for them."""
    tokens, start, processor = 0, time.perf_counter(), time.process_time()
    batches = mixture.batches(0, lambda row: HOST_BATCH_TOKENS // length)
    with contextlib.closing(batches):
        for _, batch in batches:
            tokens += batch.tokens_BL.size
            if time.perf_counter() - start > seconds:
                break
    return tokens, time.process_time() - processor, time.perf_counter() - start


def many_shards(root: Path, shards: int) -> dict[str, float]:
    """Opening a source of `shards` shards, and rows from anywhere in it."""
    # A shard of 2^26 tokens, a file of at most 65,000 names; the index is read with every opening.
    length, rows, linked = 4096, 1 << 14, 50_000
    empty = Row(np.zeros(length, np.int32), np.array([length], np.uint32))
    folder = Folder(root / "many" / f"train-{length}")
    made = []
    for number in range(shards):
        name = f"rows-{number:06d}.array_record"
        if number % linked == 0:
            members = itertools.repeat(empty, rows)
            first, tokens = write_shard(folder, name, members, length, VOCAB_SIZE)
            assert first is not None
        else:
            os.link(folder.path(first.name), folder.path(name))
        made.append(Shard(name, rows, first.bytes, first.sha256))
    write_manifest(folder, manifest_of(root, "many", length, tokens * shards, tuple(made)))

    start, before = time.perf_counter(), resident_bytes()
    mixture = open_mixture(root, {"many": 1.0}, sequence_length=length, seed=0)
    opened, held = time.perf_counter() - start, resident_bytes() - before
    start, count = time.process_time(), 2000
    for index in range(count):
        mixture.row(index)
    rate = count / (time.process_time() - start)
    shutil.rmtree(root / "many")
    return {
        "shards": shards,
        "seconds to open": opened,
        "MiB held open": held / 2**20,
        "MiB after 2,000 rows": (resident_bytes() - before) / 2**20,
        "rows/s, shards not open": rate,
        "ratio to a v5p host": rate * length / consumption(length),
    }


def make_rows(length: int, count: int) -> Iterator[Row]:
    """Rows full of documents of about 1,000 tokens, rare ids rarer, as text is (Zipf's law)."""
    rng = np.random.default_rng(length)
    for _ in range(count):
        documents = rng.exponential(MEAN_DOCUMENT, 4 * length // MEAN_DOCUMENT).astype(int)
        borders = np.unique(np.minimum(np.cumsum(1 + documents), length))
        tokens = (VOCAB_SIZE ** rng.random(length)).astype(np.int32)
        yield Row(tokens, np.diff(borders, prepend=0).astype(np.uint32))


def manifest_of(
    root: Path, source: str, length: int, tokens: int, shards: tuple[Shard, ...]
) -> Manifest:
    """The manifest of such a source."""
    return Manifest(
        source=source, sequence_length=length, vocab_size=VOCAB_SIZE, dtype="uint16",
        tokenizer_hash=tokenizer_hash(root / "tokenizer.json"), has_loss_mask=False,
        documents=tokens // MEAN_DOCUMENT, text_bytes=0, truncated=0, dropped=0, skipped=0,
        tokens=tokens, rows=sum(shard.rows for shard in shards), inputs="", shards=shards,
    )  # fmt: skip


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    app.run(main)
