"""Quality gates of a corpus: exact and near duplicates out, and what quotes an evaluation set.

Two passes over the input. The first makes fingerprints, in parts on any number of processes; then
one process decides about every document; the second pass writes what is kept. A part's
fingerprints lie in `unfinished/` and are not made again when a killed command is repeated; the
report comes last. Of a group the first document in the order of files stays.

N documents, P permutations (values of a signature), S spans, V verdicts.
"""

import functools
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ouro_jax.data.clean_parts import (
    DOCUMENT,
    DOCUMENTS,
    EXACT_DUPLICATE,
    KEPT,
    NEAR_DUPLICATE,
    SIGNATURES,
    UNFINISHED,
    VERDICTS,
    Output,
    evaluation_passages,
    part_name,
    write_fingerprints,
    write_kept,
)
from ouro_jax.data.clean_plan import Cleaning
from ouro_jax.data.files import file_system
from ouro_jax.data.fingerprints import (
    NUM_PERMUTATIONS,
    first_of_near_duplicates,
    has_shingles,
)
from ouro_jax.data.folder import TEMPORARY, Folder
from ouro_jax.data.workers import Work, run_pieces
from ouro_jax.errors import ConfigError, RunError

REPORT, MARK = "report.json", f"{UNFINISHED}/cleaning.txt"
SHOWN_SOURCES = 40

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, and of how many input bytes how many are done."""


def clean(
    cleaning: Cleaning, workers: int = 1, on_progress: OnProgress = lambda *_: None
) -> dict[str, Any]:
    """Writes what is kept below the output folder, and returns the report, which comes last.

    Neither `workers` nor kills change a byte. Returns the report at once if the folder is complete
    already. Raises ConfigError for bad input, and if the folder holds something else or has
    another writer, RunError if the disk is full or a worker dies; then finished fingerprints stay.
    """
    folder = Folder(cleaning.output)
    with folder.locked():
        if folder.has(REPORT):
            return _complete(cleaning, folder)
        _begin(cleaning, folder)
        try:
            return _clean(cleaning, folder, workers, on_progress)
        except BaseException as error:
            if not any(name.endswith(DOCUMENTS) for name in folder.sizes(UNFINISHED)):
                folder.remove()
            if isinstance(error, OSError):
                reason = error.strerror or error
                raise RunError(f"{folder}: cannot be written ({reason}).") from error
            raise


def _clean(
    cleaning: Cleaning, folder: Folder, workers: int, on_progress: OnProgress
) -> dict[str, Any]:
    _fingerprint(cleaning, folder, workers, on_progress)
    on_progress("comparing", 0, 0)
    documents_N, skipped = _decide(cleaning, folder)
    _write(cleaning, documents_N, workers, on_progress)
    report = _report(cleaning, documents_N, skipped)
    folder.write_text(REPORT, json.dumps(report, indent=1))
    folder.remove(UNFINISHED)
    return report


def _complete(cleaning: Cleaning, folder: Folder) -> dict[str, Any]:
    report = json.loads(folder.read_text(REPORT))
    if report.get("inputs") != cleaning.key():
        raise ConfigError(
            f"{folder} exists already and holds what was kept of other input or with other "
            "settings: remove it or choose another folder."
        )
    folder.remove(UNFINISHED)
    return report


def _begin(cleaning: Cleaning, folder: Folder) -> None:
    """Marks an empty folder, or leaves nothing but fingerprints of what was marked before."""
    system, root = file_system(cleaning.output)
    if folder.has(MARK):
        for path in system.find(root):
            inside = path.removeprefix(root).lstrip("/")
            if not inside.startswith(f"{UNFINISHED}/") or TEMPORARY in inside:
                system.rm_file(path)
    elif system.find(root):
        raise ConfigError(f"{folder} exists already and is not empty: choose another folder.")
    else:
        folder.write_text(MARK, "An unfinished cleaning: repeat the command.\n")


def _fingerprint(cleaning: Cleaning, folder: Folder, workers: int, on_progress: OnProgress) -> None:
    """Makes the fingerprints that are not there yet, of the same input and settings."""
    present = {f"{UNFINISHED}/{name}" for name in folder.sizes(UNFINISHED)}
    missing = [
        index
        for index in range(len(cleaning.parts))
        if part_name(index, DOCUMENTS) not in present
        or _load(folder, index)["key"] != cleaning.part_key(index)
    ]
    if missing:
        passages = evaluation_passages(cleaning.against)
        work = functools.partial(write_fingerprints, cleaning, passages)
        total = sum(span.size for index in missing for span in cleaning.parts[index])
        _run("reading", work, missing, workers, total, on_progress)


def _load(folder: Folder, index: int) -> Mapping[str, np.ndarray]:
    return np.load(io.BytesIO(folder.read_bytes(part_name(index, DOCUMENTS))))


def _run(
    step: str,
    work: Work,
    pieces: Sequence[int],
    workers: int,
    total: int,
    on_progress: OnProgress,
) -> None:
    """Does a step's `work` on all `pieces` and says how many of `total` bytes are done."""
    done = 0

    def advance(input_bytes: int, _: int) -> None:
        nonlocal done
        done = min(done + input_bytes, total)
        on_progress(step, done, total)

    for _ in run_pieces(work, pieces, workers, advance):
        pass
    on_progress(step, total, total)


def _decide(cleaning: Cleaning, folder: Folder) -> tuple[np.ndarray, list[str]]:
    """The documents of all parts, with spans numbered through and final verdicts; the skipped."""
    parts, first_span, skipped = [], 0, []
    for index, spans in enumerate(cleaning.parts):
        part = _load(folder, index)
        documents_N = part["documents"]
        documents_N["span"] += first_span
        parts.append(documents_N)
        first_span += len(spans)
        skipped += part["skipped"].tolist()
    if len(skipped) > cleaning.skip_bad:
        raise ConfigError(
            f"{len(skipped):,} unreadable records, skip_bad = {cleaning.skip_bad:,} allows no "
            f"more; the last: {skipped[-1]}"
        )
    documents_N = np.concatenate([np.zeros(0, DOCUMENT), *parts])
    verdict_N = documents_N["verdict"]
    candidates = np.flatnonzero(verdict_N == KEPT)
    _, first = np.unique(documents_N["hash"][candidates], return_index=True)
    verdict_N[np.delete(candidates, first)] = EXACT_DUPLICATE
    verdict_N[_near_duplicates(cleaning, folder, verdict_N == KEPT)] = NEAR_DUPLICATE
    return documents_N, skipped


def _near_duplicates(cleaning: Cleaning, folder: Folder, is_kept_N: np.ndarray) -> np.ndarray:
    """The numbers of the near duplicates among the documents that are kept so far."""
    numbers, start = [np.zeros(0, np.int64)], 0
    # The file has no name: it is gone when this process is, however that ends.
    aside = folder.path(UNFINISHED) if folder.is_local else None
    with tempfile.TemporaryFile(dir=aside) as file:
        for index in range(len(cleaning.parts)):
            data = folder.read_bytes(part_name(index, SIGNATURES))
            signature_NP = np.frombuffer(data, np.uint32).reshape(-1, NUM_PERMUTATIONS)
            is_kept = is_kept_N[start : start + len(signature_NP)]
            compared = np.flatnonzero(is_kept & has_shingles(signature_NP))
            file.write(signature_NP[compared].tobytes())
            numbers.append(start + compared)
            start += len(signature_NP)
        file.flush()
        number = np.concatenate(numbers)
        if not len(number):
            return number
        shape = (len(number), NUM_PERMUTATIONS)
        signature_NP = np.memmap(file, np.uint32, "r", shape=shape)
        first = first_of_near_duplicates(signature_NP, cleaning.similarity)
    return number[first != np.arange(len(first))]


def _write(
    cleaning: Cleaning, documents_N: np.ndarray, workers: int, on_progress: OnProgress
) -> None:
    """Writes what is kept: of each part the files that begin in it."""
    is_kept_N = documents_N["verdict"] == KEPT
    spans = [span for part in cleaning.parts for span in part]
    ends = np.cumsum(np.bincount(documents_N["span"], minlength=len(spans))).tolist()
    pieces: list[list[Output]] = [[] for _ in cleaning.parts]
    piece_of = [index for index, part in enumerate(cleaning.parts) for _ in part]
    for path, group in itertools.groupby(range(len(spans)), lambda i: spans[i].path):
        first, *rest = group
        last = rest[-1] if rest else first
        start = ends[first - 1] if first else 0
        pieces[piece_of[first]].append(
            Output(cleaning.outputs[path], tuple(spans[first : last + 1]), start, ends[last])
        )
    work = functools.partial(write_kept, cleaning, pieces, is_kept_N)
    total = sum(span.size for span in spans)
    _run("writing", work, range(len(pieces)), workers, total, on_progress)


def _report(cleaning: Cleaning, documents_N: np.ndarray, skipped: Sequence[str]) -> dict[str, Any]:
    """Documents and bytes by source and verdict."""
    names = sorted(set(cleaning.sources.values()))
    number_of = {name: number for number, name in enumerate(names)}
    source_S = np.array(
        [number_of[cleaning.sources[span.path]] for part in cleaning.parts for span in part], int
    )
    cell_N = source_S[documents_N["span"]] * len(VERDICTS) + documents_N["verdict"]
    cells = len(names) * len(VERDICTS)
    count = np.bincount(cell_N, minlength=cells).reshape(-1, len(VERDICTS))
    size = np.bincount(cell_N, documents_N["bytes"], cells).reshape(-1, len(VERDICTS))
    rows = [_row(*pair) for pair in zip(count, size, strict=True)]
    return {
        "inputs": cleaning.key(),
        "similarity": cleaning.similarity,
        "against": [file.path for file in cleaning.against],
        "skipped": list(skipped),
        "total": _row(count.sum(axis=0), size.sum(axis=0)),
        "sources": dict(zip(names, rows, strict=True)),
    }


def _row(count_V: np.ndarray, bytes_V: np.ndarray) -> dict[str, int]:
    return {
        "documents": int(count_V.sum()),
        "bytes": int(bytes_V.sum()),
        **dict(zip(VERDICTS, map(int, count_V), strict=True)),
        "kept_bytes": int(bytes_V[KEPT]),
    }


def describe_report(report: Mapping[str, Any]) -> str:
    """The counts as a table, a line a source, the largest sources first."""
    sources = sorted(report["sources"].items(), key=lambda item: -item[1]["documents"])
    columns = ("documents", *VERDICTS)
    rows = [["source", *(column.replace("_", " ") for column in columns)]]
    for name, row in [*sources[:SHOWN_SOURCES], ("total", report["total"])]:
        rows.append([name, *(f"{row[column]:,}" for column in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, values, widths[1:])])
        for name, *values in rows
    ]
    if len(sources) > SHOWN_SOURCES:
        lines.insert(-1, f"and {len(sources) - SHOWN_SOURCES:,} more sources in {REPORT}")
    return "\n".join(lines)
