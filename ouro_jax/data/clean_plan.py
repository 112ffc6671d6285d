"""What a cleaning reads, what it writes where, and by which rules."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import PurePath
from typing import Any

from ouro_jax.data.corpus import Corpus, Span, plan_parts
from ouro_jax.data.files import File, file_system, find_files
from ouro_jax.data.fingerprints import datasketch
from ouro_jax.errors import ConfigError, require

PART_BYTES = 1 << 28  # 256 MiB of input are about half a minute of one core


@dataclass(frozen=True)
class Cleaning:
    """What decides what is kept, and where it goes.

    `outputs`, `sources` and `modified` (Unix seconds) are by the path of an input file.
    """

    output: str
    corpus: Corpus
    similarity: float
    skip_bad: int
    against: tuple[File, ...]
    parts: tuple[tuple[Span, ...], ...]
    outputs: Mapping[str, str]
    sources: Mapping[str, str]
    modified: Mapping[str, float]

    def part_key(self, index: int) -> str:
        """A hash of what decides a part's fingerprints; of file contents, their sizes and times."""
        spans = [(*astuple(span), self.modified[span.path]) for span in self.parts[index]]
        return _hash([spans, astuple(self.corpus), self.against])

    def key(self) -> str:
        """A hash of what decides the whole output."""
        parts = [self.part_key(index) for index in range(len(self.parts))]
        return _hash([parts, self.similarity, self.outputs, self.sources])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def plan_cleaning(
    pattern: str,
    *,
    output: str | os.PathLike,
    corpus: Corpus,
    against: str = "",
    similarity: float = 0.8,
    skip_bad: int = 0,
    part_bytes: int = PART_BYTES,
) -> Cleaning:
    """Finds the input files and the evaluation sets, and decides where everything goes.

    `against` are JSONL files (none: nothing is checked): every text anywhere in their records
    counts. `similarity` is the least Jaccard similarity of near duplicates. A document's source
    is the first folder below the part of `pattern` without wildcards, or else its file's name.
    """
    require(0 < similarity <= 1, "similarity", similarity, "above 0, at most 1")
    require(skip_bad >= 0, "skip_bad", skip_bad, "0 or more")
    require(part_bytes >= 1, "shard_bytes", part_bytes, "at least 1")
    datasketch()
    files = find_files(pattern)
    parts = tuple(plan_parts(files, corpus, part_bytes))
    system, bare = file_system(pattern)
    root = _fixed_part(bare, is_folder=system.isdir(bare))
    outputs: dict[str, str] = {}
    sources: dict[str, str] = {}
    for path in dict.fromkeys(span.path for spans in parts for span in spans):
        inside = file_system(path)[1].removeprefix(root).lstrip("/")
        stem = _stem(inside)
        outputs[path] = f"{stem}.jsonl"
        sources[path] = stem.split("/")[0]
    _check_different(outputs)
    return Cleaning(
        output=os.fspath(output),
        corpus=corpus,
        similarity=similarity,
        skip_bad=skip_bad,
        against=_find_evaluations(against),
        parts=parts,
        outputs=outputs,
        sources=sources,
        modified={file.path: file.modified for file in files},
    )


def _find_evaluations(pattern: str) -> tuple[File, ...]:
    try:
        return tuple(find_files(pattern)) if pattern else ()
    except ConfigError as error:
        raise ConfigError(f"evaluation sets (against): {error}") from error


def _fixed_part(pattern: str, is_folder: bool) -> str:
    """The folder that a pattern begins with."""
    if is_folder:
        return pattern
    folders = pattern.split("/")[:-1]
    fixed = [index for index, folder in enumerate(folders) if set(folder) & set("*?[")]
    return "/".join(folders[: fixed[0]] if fixed else folders)


def _stem(path: str) -> str:
    path = path.removesuffix(".gz").removesuffix(".zst")
    suffix = PurePath(path).suffix
    known = suffix in (".jsonl", ".json", ".txt", ".parquet", ".arrow")
    return path.removesuffix(suffix) if known else path


def _check_different(outputs: Mapping[str, str]) -> None:
    input_of: dict[str, str] = {}
    for path, name in outputs.items():
        other = input_of.setdefault(name, path)
        if other != path:
            raise ConfigError(f"{other} and {path} would both be written to {name}: rename one.")
