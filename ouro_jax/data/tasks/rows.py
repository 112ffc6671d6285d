"""A task as a data root: its tokenizer, its training rows by settings, its held-out rows as files.

`root/<source>/train-<length>/manifest.json` says that the rows there are those of a task, with its
settings; `root/<set>/heldout-<length>/` holds one problem a row, prepared like any other data.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from ouro_jax.data.folder import Folder, rename_unless_there
from ouro_jax.data.packing import Document
from ouro_jax.data.rows import (
    MANIFEST,
    Manifest,
    Row,
    Shard,
    token_dtype,
    write_manifest,
    write_shard,
)
from ouro_jax.data.tasks.brevo import Brevo
from ouro_jax.data.tasks.capo import Capo
from ouro_jax.data.tasks.depo import Depo
from ouro_jax.data.tasks.mano import Mano
from ouro_jax.data.tasks.multihop import MultiHop
from ouro_jax.data.tasks.task import END, Task
from ouro_jax.data.tokenizer import tokenizer_hash
from ouro_jax.errors import ConfigError, nearest, require, require_choice

TASKS: Mapping[str, type[Task]] = {
    "mano": Mano, "capo": Capo, "multihop": MultiHop, "depo": Depo, "brevo": Brevo
}  # fmt: skip
FORMAT = "ouro_jax task 1"
VERSION = 1  # raise it when the same settings give other rows than before


def make_task(settings: Mapping[str, Any]) -> Task:
    """The task that `settings` name and describe: `{"name": "mano", "max_length": 4}`.

    ConfigError for an unknown task or setting, with the nearest, and for a wrong value.
    """
    settings = dict(settings)
    name = settings.pop("name", "")
    require_choice(name, TASKS, "data.task.name")
    types = typing.get_type_hints(TASKS[name])
    known = [field.name for field in dataclasses.fields(TASKS[name])]
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"Unknown config key data.task.{key}.{nearest(key, known)}")
        kind = typing.get_origin(types[key]) or types[key]
        if kind is tuple and isinstance(value, list):
            settings[key] = value = tuple(value)
        require(
            isinstance(value, kind) or (kind is float and isinstance(value, int)),
            f"data.task.{key}", value, f"{kind.__name__}",
        )  # fmt: skip
    return TASKS[name](**settings)


def build_task(
    root: str | os.PathLike, settings: Mapping[str, Any], sequence_lengths: list[int]
) -> Path:
    """Makes the data root of a task, a folder of `root` named by its settings; returns it.

    If it is there already nothing is done. Raises ConfigError as `make_task`, and if a row is too
    short for the task's problems.
    """
    task = make_task(settings)
    for length in sequence_lengths:
        require(
            length >= task.longest(), "sequence_length", length,
            f"at least {task.longest()}, the longest of the task {settings['name']!r}",
        )  # fmt: skip
    described = {"version": VERSION, "name": settings["name"], **dataclasses.asdict(task)}
    identity = json.dumps([described, sequence_lengths], sort_keys=True)
    final = Path(root) / f"{settings['name']}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if final.is_dir():
        return final
    Path(root).mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{settings['name']}-", dir=root))
    try:
        _write(temporary, task, described, sequence_lengths)
        temporary.chmod(0o755)
        rename_unless_there(temporary, final)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return final


def _write(root: Path, task: Task, described: Mapping[str, Any], lengths: list[int]) -> None:
    _tokenizer(task).save(str(root / "tokenizer.json"))
    described = {key: value for key, value in described.items() if key != "version"}
    for length in lengths:
        for source in task.sources:
            text = {"format": FORMAT, "source": source, "sequence_length": length,
                    "task": described}  # fmt: skip
            Folder(root / source / f"train-{length}").write_text(
                MANIFEST, json.dumps(text, indent=1) + "\n"
            )
        for name in task.heldout_sets:
            rows = [pack_row([problem], length) for problem in task.heldout(name)]
            folder = Folder(root / name / f"heldout-{length}")
            shard, tokens = write_shard(folder, "rows.array_record", rows, length,
                                        len(task.vocabulary))  # fmt: skip
            assert shard is not None, "a held-out set has at least one problem"
            hashed = tokenizer_hash(root / "tokenizer.json")
            write_manifest(
                folder, _manifest(task, name, length, hashed, len(rows), tokens, (shard,))
            )


def _tokenizer(task: Task) -> Tokenizer:
    """Words with spaces between them: `<bos> <len_1> + 3 4 <ans> 2`."""
    tokenizer = Tokenizer(models.WordLevel(task.vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[reportAttributeAccessIssue]
    return tokenizer


def _manifest(
    task: Task, source: str, length: int, tokenizer: str, rows: int, tokens: int,
    shards: tuple[Shard, ...],
) -> Manifest:  # fmt: skip
    return Manifest(
        source=source, sequence_length=length, vocab_size=len(task.vocabulary),
        tokenizer_hash=tokenizer, dtype=token_dtype(len(task.vocabulary)).name,
        has_loss_mask=True, documents=rows, text_bytes=0, truncated=0, dropped=0, skipped=0,
        tokens=tokens, rows=rows, inputs="", shards=shards,
    )  # fmt: skip


class TaskRows:
    """Random access to the training rows of a task; a source for `grain.MapDataset.source`."""

    def __init__(self, task: Task, source: str, manifest: Manifest):
        self.task, self.source, self.manifest = task, source, manifest

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, index: int) -> Row:
        length = self.manifest.sequence_length
        return pack_row(self.task.documents(self.source, int(index), length), length)


def open_task_rows(root: str | os.PathLike, directory: str | os.PathLike) -> TaskRows | None:
    """The training rows of a task whose manifest lies in `directory`; None if it is no task's."""
    folder = Folder(directory)
    try:
        described = json.loads(folder.read_bytes(MANIFEST))
    except ValueError:
        return None  # `open_rows` says what is wrong with it
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        return None
    task, length = make_task(described["task"]), described["sequence_length"]
    hashed = tokenizer_hash(Path(root) / "tokenizer.json")
    source = described["source"]
    rows = task.num_rows(source, length)
    return TaskRows(task, source, _manifest(task, source, length, hashed, rows, rows * length, ()))


def pack_row(documents: list[Document], sequence_length: int) -> Row:
    """The row of `documents`, one after the other, padded at its end."""
    tokens = np.zeros(sequence_length, np.int32)
    loss_mask = np.zeros(sequence_length, bool)
    lengths = np.array([len(document.tokens) for document in documents], np.uint32)
    used = int(lengths.sum())
    tokens[:used] = np.concatenate([document.tokens for document in documents])
    loss_mask[:used] = np.concatenate(
        [np.ones(len(d.tokens), bool) if d.loss_mask is None else d.loss_mask for d in documents]
    )
    return Row(tokens, lengths, loss_mask)
