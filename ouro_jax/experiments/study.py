"""What the studies of a trained checkpoint share: its name and model, and records that are kept."""

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ouro_jax.config import ModelConfig
from ouro_jax.training.lines import Lines, read_lines

Record = dict[str, Any]
Prompts = Sequence[Sequence[int]]
Progress = Callable[[str], None]
"""Hears a line for every record that is there, whether computed or found."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint under study: what records call it, its model, its float parameters."""

    name: str
    config: ModelConfig
    params: Any

    @functools.cached_property
    def key(self) -> Record:
        """What tells its records from those of any other: the name and a hash of the weights.

        A checkpoint that was trained on, or another under the same name, is measured anew.
        """
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return {"checkpoint": self.name, "weights": digest.hexdigest()[:16]}


class Records:
    """Records in a JSONL file, one for every key; those that are there are not computed again.

    `path` None keeps them in memory only. A last line torn by a kill is dropped.
    """

    def __init__(self, path: str | os.PathLike | None, progress: Progress | None = None):
        self._path = None if path is None else Path(path)
        self._progress = progress or (lambda line: None)
        there = self._path is not None and self._path.is_file()
        self._found: list[Record] = read_lines(self._path) if self._path and there else []

    def once(self, key: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Record:
        """The record of `key`: from the file, or the key and what `compute` returns, written."""
        key = _plain(key)
        label = " ".join(str(value) for name, value in key.items() if name != "weights")
        for record in self._found:
            if key.items() <= record.items():
                self._progress(f"{label}: found")
                return record
        record = key | _plain(compute())
        self._found.append(record)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(Lines(self._path)) as lines:
                lines.append(record)
        self._progress(f"{label}: done")
        return record


def prompts_key(prompts: Prompts) -> str:
    """How many prompts there are, and a hash of their tokens."""
    text = json.dumps([list(map(int, prompt)) for prompt in prompts])
    return f"{len(prompts)} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _plain(value: Any) -> Any:
    """As JSON has it: arrays as lists, what is not a finite number as null."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
