"""What cleaning costs: processor time, disk and memory per document, and what that makes at scale.

    python -m benchmarks.clean [--megabytes=30] [--synthetic=1000000]

The documents are the functions and classes of Python's own library, in one process; then so many
synthetic signatures are compared, a tenth of them copies, from a file as in a cleaning. Seconds
are of processor time, so that other work on the machine counts little. Then how many pairs are
found at several similarities, and what a signature takes in the dictionaries of MinHashLSH.
"""

import json
import re
import sysconfig
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.measure import shown
from ouro_jax.data import clean, fingerprints
from ouro_jax.data.clean_parts import SIGNATURES, UNFINISHED, write_fingerprints
from ouro_jax.data.clean_plan import plan_cleaning
from ouro_jax.data.corpus import Corpus

MEGABYTES = flags.DEFINE_integer("megabytes", 30, "Text to clean.")
SYNTHETIC = flags.DEFINE_integer("synthetic", 1_000_000, "Signatures to compare.")
# The paper's mid-training mix, by the bytes of a token that SmolLM2's tokenizer makes of English.
MIX_TOKENS, BYTES_PER_TOKEN, MIX_DOCUMENTS = 182e9, 4.2, 100e6
LSH_DOCUMENTS = 50_000
EVALUATION_TEXTS = 2_000
PAIRS = 500


def main(_: Any) -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as directory:
        figures = {**_gates(Path(directory)), **_comparison(Path(directory))}
    figures.update(_found())
    figures["datasketch's MinHashLSH, bytes of memory a document"] = _lsh_bytes()
    for name, value in figures.items():
        print(f"| {name} | {shown(value)} |")


def _documents(limit: int) -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        for document in re.split(r"\n(?=def |class |    def )", path.read_text(errors="replace")):
            if len(document) > 100:
                yield document
                limit -= len(document)
            if limit < 0:
                return


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def _gates(directory: Path) -> dict[str, float]:
    """Both passes over real text, the first also by itself."""
    documents = list(_documents(MEGABYTES.value * 1_000_000))
    for name, some in {"in": documents, "evaluation": documents[-EVALUATION_TEXTS:]}.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in some)
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    cleaning = plan_cleaning(
        str(directory / "in.jsonl"),
        output=directory / "out",
        corpus=Corpus(),
        against=str(directory / "evaluation.jsonl"),
    )
    passages = clean.evaluation_passages(cleaning.against)
    reading, _ = _timed(lambda: write_fingerprints(cleaning, passages, 0, lambda *_: None))
    disk = sum(path.stat().st_size for path in (directory / "out" / UNFINISHED).iterdir())
    for path in (directory / "out" / UNFINISHED).iterdir():
        path.unlink()
    whole, report = _timed(lambda: clean.clean(cleaning))
    size, count = report["total"]["bytes"] / 1e6, len(documents)
    print(clean.describe_report(report))
    return {
        "documents": count,
        "bytes a document": size * 1e6 / count,
        "fingerprints, MB/s of a core": size / reading,
        "fingerprints, documents/s of a core": count / reading,
        "all steps, MB/s of a core": size / whole,
        "all steps, documents/s of a core": count / whole,
        "disk while at work, bytes a document": disk / count,
        f"core-hours for {MIX_TOKENS / 1e9:.0f}B tokens": MIX_TOKENS
        * BYTES_PER_TOKEN
        / 1e6
        / (size / whole)
        / 3600,
    }


def _comparison(directory: Path) -> dict[str, float]:
    """Grouping signatures in a file; a tenth are copies with 5 % other values."""
    count, rng = SYNTHETIC.value, np.random.RandomState(0)
    shape = (count, fingerprints.NUM_PERMUTATIONS)
    signature_NP = np.memmap(directory / f"all{SIGNATURES}", np.uint32, "w+", shape=shape)
    for start in range(0, count, 1 << 16):
        rows = signature_NP[start : start + (1 << 16)]
        rows[:] = rng.randint(0, 2**32, rows.shape, np.uint32)
        copies = len(rows) // 10
        keep = rng.random((copies, shape[1])) < 0.95
        rows[-copies:] = np.where(keep, rows[:copies], rows[-copies:])
    seconds, first = _timed(lambda: fingerprints.first_of_near_duplicates(signature_NP, 0.8))
    tracemalloc.start()
    fingerprints.first_of_near_duplicates(signature_NP, 0.8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "signatures compared": count,
        "copies found of those planted": (first != np.arange(count)).sum() / (count // 10),
        "comparing, documents/s of a core": count / seconds,
        "comparing, bytes of memory a document": peak / count,
        f"hours to compare {MIX_DOCUMENTS / 1e6:.0f}M documents": MIX_DOCUMENTS
        / (count / seconds)
        / 3600,
        f"GB of memory for {MIX_DOCUMENTS / 1e6:.0f}M documents": MIX_DOCUMENTS
        * peak
        / count
        / 1e9,
    }


def _found() -> dict[str, float]:
    """Of pairs of 300 words that differ in some, the share found, by their true similarity."""
    rng, figures = np.random.RandomState(0), {}
    for edits in (3, 6, 8, 10, 14, 20):
        pairs_W = rng.randint(0, 2**63, (PAIRS, 2, 300), np.uint64)
        pairs_W[:, 1] = pairs_W[:, 0]
        for pair_W in pairs_W:
            pair_W[1, rng.choice(300, edits, replace=False)] += np.uint64(1)
        signatures = [fingerprints.signature(text_W) for pair_W in pairs_W for text_W in pair_W]
        first = fingerprints.first_of_near_duplicates(np.array(signatures), 0.8)
        found = (first != np.arange(2 * PAIRS)).mean() * 2
        figures[f"pairs found at a similarity of {np.mean([*map(_similarity, pairs_W)]):.2f}"] = (
            found
        )
    return figures


def _similarity(pair_W: np.ndarray) -> float:
    left, right = (set(fingerprints.ngram_hashes(text_W, 5).tolist()) for text_W in pair_W)
    return len(left & right) / len(left | right)


def _lsh_bytes() -> float:
    datasketch = fingerprints.datasketch()
    empty, rng = datasketch.MinHash(fingerprints.NUM_PERMUTATIONS), np.random.RandomState(0)
    index = datasketch.MinHashLSH(0.8, fingerprints.NUM_PERMUTATIONS, fingerprints.BAND_WEIGHTS)
    tracemalloc.start()
    for key in range(LSH_DOCUMENTS):
        sketch = empty.copy()
        sketch.hashvalues = rng.randint(0, 2**32, fingerprints.NUM_PERMUTATIONS, np.uint32)
        index.insert(key, sketch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / LSH_DOCUMENTS


if __name__ == "__main__":
    app.run(main)
