"""Speed of `ouro data prepare` beside the bare `tokenizers` library, and the sizing it leads to.

    python -m benchmarks.prepare [--workdir=runs/prepare] [--megabytes=64] [--cores=1,2]
        [--repeats=3] [--tokens_per_second=0]

Text: sources and documentation of this Python and of what is installed in it, a file a document,
as JSON lines; a byte-level BPE of 49,152 entries trained on it. Both are made once and kept in
`workdir`. Peer: `encode_batch_fast` (and `encode_batch`) of `tokenizers` on the same texts already
in memory, in calls of as many characters as ours, on as many threads as cores. Ours: all of
`prepare` for rows of 4,096: reading, tokenising, packing, writing, checksums, a process per core.
Repeats are interleaved, each run in a process of its own that is bound to its cores. Beside wall
time stands processor time, whose ratio survives other work on the machine.

Goal: within 15 % of the library, that is a ratio of 0.87. Then: padding by row length, and what
the paper's 7.7T tokens take at `tokens_per_second` per core (0: what was just measured).
"""

import json
import os
import resource
import runpy
import shutil
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.measure import shown
from ouro_jax.config import from_config_dict
from ouro_jax.data.corpus import Corpus
from ouro_jax.data.packing import Document, pack
from ouro_jax.data.prepare import SHARD_BYTES, plan_preparation, prepare
from ouro_jax.data.rows import Manifest
from ouro_jax.data.tokenizer import CHUNK_CHARACTERS, load_tokenizer, train_tokenizer

VOCAB_SIZE = 49_152
SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
LENGTHS = (4096, 16_384, 32_768, 65_536)
PARTS_PER_CORE = 2

_WORKDIR = flags.DEFINE_string("workdir", "runs/prepare", "Where text and tokenizer are kept.")
_MEGABYTES = flags.DEFINE_integer("megabytes", 64, "Text to prepare.", 1)
_CORES = flags.DEFINE_list("cores", ["1", "2"], "Cores to use.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Interleaved runs of each.", 1)
_SPEED = flags.DEFINE_integer(
    "tokens_per_second", 0, "Of one core, for the sizing; 0: as measured."
)


def main(_) -> None:
    """Prints three tables, and the speeds as one JSON line last."""
    workdir = Path(_WORKDIR.value) / f"{_MEGABYTES.value}MB"
    if not (workdir / "tokenizer.json").is_file():
        _make_text(workdir, _MEGABYTES.value * 10**6)
    speeds = [measure(workdir, int(cores), _REPEATS.value) for cores in _CORES.value]
    for name in speeds[0]:
        print(f"{name:36s}" + "".join(f"{shown(speed[name]):>12s}" for speed in speeds))
    manifest = _in_child(_prepared, 1, workdir, 1)
    lengths = np.array(_in_child(_document_lengths, 1, workdir))
    print(f"\n{manifest.tokens:,} tokens in {manifest.documents:,} documents, "
          f"{manifest.text_bytes / manifest.tokens:.2f} bytes of text a token")  # fmt: skip
    for length in LENGTHS:
        print(f"padding of rows of {length:6,d}: {padding_share(lengths, length):.3%}")
    speed = _SPEED.value or round(speeds[0]["ours, tokens/s by processor"])
    print("\n".join(["", *sizing(manifest, speed)]))
    print(json.dumps(speeds))


def _make_text(workdir: Path, num_bytes: int) -> None:
    """Writes `texts.jsonl` of about `num_bytes` and the tokenizer trained on it."""
    workdir.mkdir(parents=True, exist_ok=True)
    texts, used = [], 0
    for text in _local_texts():
        texts.append(text)
        used += len(text.encode())
        if used >= num_bytes:
            break
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (workdir / "texts.jsonl").write_text("".join(lines))
    train_tokenizer(texts, VOCAB_SIZE).save(str(workdir / "tokenizer.json"))


def _local_texts() -> Iterator[str]:
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                content = path.read_bytes()
                try:
                    yield content.decode("utf-8")
                except UnicodeDecodeError:
                    continue  # test data of the standard library, in other encodings on purpose


def measure(workdir: Path, cores: int, repeats: int) -> dict[str, float]:
    """Tokens per second and ratios: medians over interleaved repeats."""
    runs: dict[str, tuple[Callable, Any]] = {
        "encode_batch_fast": (_bare, "encode_batch_fast"),
        "encode_batch": (_bare, "encode_batch"),
        "ours": (_ours, cores),
    }
    wall: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (run, argument) in runs.items():
            tokens, wall_seconds, processor_seconds = _in_child(run, cores, workdir, argument)
            wall[name].append(tokens / wall_seconds)
            processor[name].append(tokens / processor_seconds)

    def ratio(rates: dict[str, list[float]]) -> float:
        pairs = zip(rates["ours"], rates["encode_batch_fast"], strict=True)
        return statistics.median(ours / bare for ours, bare in pairs)

    rates = {f"{name}, tokens/s": statistics.median(wall[name]) for name in runs}
    by_processor = {
        f"{name}, tokens/s by processor": statistics.median(processor[name]) for name in runs
    }
    return {
        "cores": cores,
        **rates,
        **by_processor,
        "ours / encode_batch_fast": ratio(wall),
        "the same by processor time": ratio(processor),
        "load of the machine": os.getloadavg()[0],
    }


def _in_child(function: Callable, cores: int, *arguments: Any) -> Any:
    """Calls it in a new process bound to the first `cores` cores this process may use."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    with ProcessPoolExecutor(
        1, get_context("spawn"), os.sched_setaffinity, (0, allowed)
    ) as process:
        return process.submit(function, *arguments).result()


def _bare(workdir: Path, method: str) -> tuple[int, float, float]:
    """Tokens, wall and processor seconds of the library alone."""
    encode = getattr(load_tokenizer(workdir / "tokenizer.json"), method)
    chunks, tokens, wall, processor = _chunks(workdir), 0, 0.0, 0.0
    for chunk in chunks:
        start, start_processor = time.perf_counter(), time.process_time()
        encodings = encode(chunk, add_special_tokens=False)
        wall += time.perf_counter() - start
        processor += time.process_time() - start_processor
        tokens += sum(len(encoding) for encoding in encodings)
    return tokens, wall, processor


def _ours(workdir: Path, workers: int) -> tuple[int, float, float]:
    """The same of `prepare`; the starts of its processes count."""
    start, start_processor = time.perf_counter(), _processor_seconds()
    manifest = _prepared(workdir, workers)
    tokens = manifest.tokens - manifest.documents  # the library sets no end-of-text tokens
    return tokens, time.perf_counter() - start, _processor_seconds() - start_processor


def _prepared(workdir: Path, workers: int) -> Manifest:
    """Prepares the text anew."""
    output = workdir / "rows"
    shutil.rmtree(output, ignore_errors=True)
    texts = workdir / "texts.jsonl"
    parts = PARTS_PER_CORE * workers if workers > 1 else 1
    preparation = plan_preparation(
        str(texts),
        tokenizer=workdir / "tokenizer.json",
        sequence_length=LENGTHS[0],
        output=output / "benchmark" / f"all-{LENGTHS[0]}",
        corpus=Corpus(),
        shard_bytes=-(-texts.stat().st_size // parts),
    )
    return prepare(preparation, workers)


def _processor_seconds() -> float:
    """Of this process and of those it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _chunks(workdir: Path) -> list[list[str]]:
    """The texts (none is empty) in lists of as many characters as `prepare` encodes at once."""
    chunks: list[list[str]] = [[]]
    characters = 0
    with (workdir / "texts.jsonl").open() as file:
        for text in filter(None, (json.loads(line)["text"] for line in file)):
            if characters >= CHUNK_CHARACTERS:
                chunks.append([])
                characters = 0
            chunks[-1].append(text)
            characters += len(text)
    return chunks


def _document_lengths(workdir: Path) -> list[int]:
    """Tokens of every document, its end-of-text token included."""
    tokenizer = load_tokenizer(workdir / "tokenizer.json")
    chunks = _chunks(workdir)
    encoded = (tokenizer.encode_batch_fast(chunk, add_special_tokens=False) for chunk in chunks)
    return [len(encoding) + 1 for encodings in encoded for encoding in encodings]


def padding_share(lengths: np.ndarray, sequence_length: int) -> float:
    """The share of token places left empty when documents of these lengths are packed."""
    documents = (Document(np.zeros(length, np.int32)) for length in lengths)
    rows = sum(1 for _ in pack(documents, sequence_length))
    return 1 - lengths.sum() / (rows * sequence_length)


def sizing(manifest: Manifest, tokens_per_second: float) -> list[str]:
    """What the 1.4B curriculum takes, a line per row length.

    Only tokens that the stages use are prepared, for each row length anew. Bytes of a token as
    text, as a row (uint16, and 4 bytes a document) and on disk (ArrayRecord compresses every row)
    are those of `manifest`.
    """
    config = from_config_dict(runpy.run_path("configs/ouro_1p4b.py")["get_config"]())
    used: dict[int, int] = dict.fromkeys(LENGTHS, 0)
    for _, stage in config.stream():
        used[stage.sequence_length] += stage.tokens
    text_bytes = manifest.text_bytes / manifest.tokens
    row_bytes = 2 + 4 * manifest.documents / manifest.tokens
    disk_bytes = sum(shard.bytes for shard in manifest.shards) / manifest.tokens
    columns = ("rows of", "tokens, B", "text, TB", "rows, TB", "disk, TB", "shards", "core hours")
    lines = ["".join(f"{column:>12s}" for column in columns)]
    for name, tokens in [*((f"{n:,}", used[n]) for n in LENGTHS), ("all", sum(used.values()))]:
        lines.append(
            f"{name:>12s}{tokens / 1e9:12,.0f}{tokens * text_bytes / 1e12:12,.2f}"
            f"{tokens * row_bytes / 1e12:12,.2f}{tokens * disk_bytes / 1e12:12,.2f}"
            f"{tokens * text_bytes / SHARD_BYTES:12,.0f}{tokens / tokens_per_second / 3600:12,.0f}"
        )
    hours = sum(used.values()) / tokens_per_second / 3600
    took = ", ".join(f"{hours / cores:,.1f} hours on {cores:,}" for cores in (64, 512, 4096))
    return [*lines, f"at {tokens_per_second:,.0f} tokens/s a core: {took} cores"]


if __name__ == "__main__":
    app.run(main)
