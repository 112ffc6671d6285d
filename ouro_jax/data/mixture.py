"""Sources of rows mixed by weight and read at any position, on any number of hosts.

Each source: shuffle → repeat (Grain's `MapDataset`, random access); then mix → slice by host →
batch. The position is one integer, the global rows consumed, and every row's place follows from
its number alone: reading starts anywhere at once, the number of hosts changes nothing but who
reads which row, and the batch may change from step to step. Spans of rows may be skipped, and
each source may go on from where other stages left it.
"""

import hashlib
import os
import resource
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import grain
from etils import epath

from ouro_jax.data.bad_rows import BadRows, UnreadableRow
from ouro_jax.data.batch import Batch, batch_from_rows
from ouro_jax.data.folder import Folder
from ouro_jax.data.interleave import Interleave
from ouro_jax.data.rows import (
    MANIFEST,
    OPEN_SHARDS,
    Manifest,
    Row,
    RowSource,
    open_rows,
    padding_row,
)
from ouro_jax.data.tasks.rows import TaskRows, open_task_rows
from ouro_jax.data.tokenizer import load_tokenizer, token_byte_lengths, tokenizer_hash
from ouro_jax.errors import ConfigError, nearest

# Grain seeds epoch e of a shuffle with seed + e: with seeds this far apart, no two sources share
# a permutation for so many epochs.
SEED_SPACING = 1 << 16
PREFETCH_STEPS = 4
READ_THREADS = 2
# Open files that are left to all but shards: checkpoints, logs, libraries, sockets of the hosts.
OTHER_FILES = 512


@dataclass(frozen=True)
class SourceSummary:
    """One source of a mixture: rows, tokens without padding, documents, and its share of rows."""

    rows: int
    tokens: int
    documents: int
    weight: float


class Mixture:
    """An endless sequence of rows, numbered from 0, drawn from sources as `order` says.

    Source s is read from its row `first_rows[s]` on: row 0 unless others have read it before.
    With `bad_rows`, rows that cannot be read are counted there and replaced by padding, which
    moves no other row; without, the first one ends the reading.
    """

    def __init__(
        self,
        sources: Mapping[str, RowSource | TaskRows],
        order: Interleave,
        seeds: Mapping[str, int],
        first_rows: Mapping[str, int] | None = None,
        bad_rows: BadRows | None = None,
    ):
        self.order, self._bad_rows = order, bad_rows
        self._sources = dict(sources)
        self._first_rows = {name: (first_rows or {}).get(name, 0) for name in self._sources}
        self._datasets = {
            name: grain.MapDataset.source(source).shuffle(seed=seeds[name]).repeat()
            for name, source in self._sources.items()
        }

    def locate(self, index: int) -> tuple[str, int]:
        """The source that gives global row `index`, and how many of its rows were read before."""
        name, index_in_source = self.order.locate(index)
        return name, index_in_source + self._first_rows[name]

    def row(self, index: int) -> Row:
        """Global row `index`; UnreadableRow, or what `bad_rows` raises, if it cannot be read."""
        name, index_in_source = self.locate(index)
        try:
            row = self._datasets[name][index_in_source]
        except UnreadableRow as error:
            if self._bad_rows is None:
                raise
            self._bad_rows.skip(error)
            return padding_row(self._sources[name].manifest.sequence_length)
        assert row is not None  # Grain's sign for a filtered element; nothing is filtered here
        return row

    def epochs(self, num_rows: int) -> dict[str, float]:
        """How often each source has been read through after the first `num_rows`."""
        return {
            name: (self._first_rows[name] + drawn) / len(self._sources[name])
            for name, drawn in self.order.drawn(num_rows).items()
        }

    def restarts(self, start: int, end: int) -> dict[str, int]:
        """The sources that start again among global rows `start` … `end`, with their new epoch.

        Epochs count from 1, and a source's first one is no restart. Where a source starts more
        than once, the last epoch is given.
        """
        before, after = self.order.drawn(start), self.order.drawn(end)
        restarted = {}
        for name, source in self._sources.items():
            first = self._first_rows[name]
            old, new = ((first + n - 1) // len(source) for n in (before[name], after[name]))
            if new > max(old, 0):
                restarted[name] = new + 1
        return restarted

    def read(self, start: int, num_rows: int, host: int = 0, num_hosts: int = 1) -> Batch:
        """This host's share of the global rows `start` … `start + num_rows`.

        Host h of n takes every n-th row from the h-th on; `num_rows` is a multiple of n.
        """
        if num_rows % num_hosts:
            raise ConfigError(
                f"{num_rows} rows of a batch cannot be divided among {num_hosts} hosts."
            )
        return batch_from_rows(
            [self.row(index) for index in range(start + host, start + num_rows, num_hosts)]
        )

    def batches(
        self,
        position: int,
        batch_rows_at: Callable[[int], int],
        *,
        host: int = 0,
        num_hosts: int = 1,
    ) -> Generator[tuple[int, Batch], None, None]:
        """Steps from global row `position` on, as (first row, this host's batch), read ahead.

        `batch_rows_at(position)` says how many global rows the step at `position` takes; 0 ends
        the iteration. Closing the generator (`contextlib.closing`) ends its threads.
        """
        steps: deque[tuple[int, Future[Batch]]] = deque()
        with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="rows") as readers:
            while True:
                while len(steps) < PREFETCH_STEPS and (rows := batch_rows_at(position)):
                    future = readers.submit(self.read, position, rows, host, num_hosts)
                    steps.append((position, future))
                    position += rows
                if not steps:
                    return
                start, future = steps.popleft()
                yield start, future.result()

    def describe(self) -> dict[str, SourceSummary]:
        """What each source holds and its share, by name."""
        return {
            name: SourceSummary(
                source.manifest.rows,
                source.manifest.tokens,
                source.manifest.documents,
                self.order.weights[name],
            )
            for name, source in self._sources.items()
        }


def open_mixture(
    root: str | os.PathLike,
    weights: Mapping[str, float],
    *,
    split: str = "train",
    sequence_length: int,
    seed: int,
    expected_vocab_size: int | None = None,
    first_rows: Mapping[str, int] | None = None,
    skip_rows: tuple[tuple[int, int], ...] = (),
    other_sources: Iterable[str] = (),
    bad_rows: BadRows | None = None,
) -> Mixture:
    """Opens the rows `root/<source>/<split>-<sequence_length>/` of every source with a weight.

    `first_rows`, `bad_rows` and `skip_rows` are those of `Mixture` and `Interleave`. A source has
    the same order of rows in every mixture of the same `seed` that knows the same sources;
    `other_sources` names those that are not in this one.

    Raises ConfigError if the weights do not sum to one, a source or rows of this length are
    missing, the rows were made with another tokenizer than `root/tokenizer.json` or for another
    vocabulary than `expected_vocab_size`, or the system allows too few open files.
    """
    if any(weight < 0 for weight in weights.values()) or abs(sum(weights.values()) - 1) > 1e-6:
        raise ConfigError(
            f"mixture {dict(weights)}: expected shares of 0 or more that sum to one; these sum to "
            f"{sum(weights.values()):.6g}."
        )
    sources = {
        name: open_source(root, name, split, sequence_length, expected_vocab_size)
        for name, weight in weights.items()
        if weight > 0
    }
    _allow_open_files(sum(min(len(s.manifest.shards), OPEN_SHARDS) for s in sources.values()))
    seeds = source_seeds({*sources, *other_sources}, seed)
    return Mixture(sources, Interleave(weights, skip_rows), seeds, first_rows, bad_rows)


def _allow_open_files(shards: int) -> None:
    """Raises the limit of open files for this process; usual is 1,024, which two sources pass."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + OTHER_FILES
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ConfigError(
            f"The sources of the mixture keep up to {shards:,} shards open, and with all else that "
            f"takes {needed:,} open files; the system allows {hard:,}. Raise the limit "
            f"(`ulimit -Hn {needed}`), or prepare the data in fewer, larger shards."
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def open_source(
    root: str | os.PathLike,
    source: str,
    split: str,
    sequence_length: int,
    expected_vocab_size: int | None = None,
) -> RowSource | TaskRows:
    """The rows of one source, checked against the tokenizer at `root`; errors as above."""
    directory = _find_rows(epath.Path(root), source, split, sequence_length)
    rows = open_task_rows(root, directory) or open_rows(directory)
    _check_tokenizer(epath.Path(root), directory, rows.manifest, expected_vocab_size)
    if rows.manifest.sequence_length != sequence_length:
        raise ConfigError(
            f"{directory}: its rows have {rows.manifest.sequence_length} tokens, the folder's "
            f"name says {sequence_length}."
        )
    return rows


def _find_rows(root: epath.Path, source: str, split: str, sequence_length: int) -> epath.Path:
    directory = root / source / f"{split}-{sequence_length}"
    if Folder(directory).has(MANIFEST):
        return directory
    available = list_sources(root)
    if not available:
        raise ConfigError(f"{root}: no prepared data there. Prepare some with `ouro data prepare`.")
    if source not in available:
        raise ConfigError(
            f"mixture: no source {source!r} in {root}; there are {', '.join(available)}."
            f"{nearest(source, available)}"
        )
    lengths = [length for name, length in available[source] if name == split]
    there = f"the data rows have {', '.join(map(str, lengths))}" if lengths else "there is none"
    longer = (
        " The sequence is longer than the data rows."
        if (lengths and sequence_length > max(lengths))
        else ""
    )
    raise ConfigError(
        f"sequence_length = {sequence_length}: source {source!r} in {root} has no {split!r} "
        f"rows of this length; {there}.{longer}"
    )


def list_sources(root: str | os.PathLike) -> dict[str, list[tuple[str, int]]]:
    """The (split, sequence length) pairs of every source found in `root`, sorted."""
    found: dict[str, list[tuple[str, int]]] = {}
    for source in Folder(root).folders():
        for name in Folder(f"{root}/{source}").folders():
            split, _, length = name.rpartition("-")
            if length.isdigit() and Folder(f"{root}/{source}/{name}").has(MANIFEST):
                found.setdefault(source, []).append((split, int(length)))
    return {name: sorted(entries) for name, entries in found.items()}


def _check_tokenizer(
    root: epath.Path, directory: epath.Path, manifest: Manifest, expected_vocab_size: int | None
) -> None:
    path = root / "tokenizer.json"
    hash_here = tokenizer_hash(path)
    if manifest.tokenizer_hash != hash_here:
        raise ConfigError(
            f"{directory} was made with another tokenizer ({manifest.tokenizer_hash[:12]}…) than "
            f"{path} ({hash_here[:12]}…)."
        )
    if expected_vocab_size is not None and manifest.vocab_size != expected_vocab_size:
        raise ConfigError(
            f"The vocabularies of tokenizer and model differ: {path} has {manifest.vocab_size} "
            f"entries, model.vocab_size = {expected_vocab_size}."
        )


def source_seeds(names: Iterable[str], seed: int) -> dict[str, int]:
    """A shuffle seed per source, from its name and `seed`, at least `SEED_SPACING` apart.

    A source keeps its seed when others join, unless their hashes fall on the same place (a
    chance of 1 in 65,536 per pair); then the alphabetically later one moves on.
    """
    places = (1 << 32) // SEED_SPACING
    taken: dict[int, str] = {}
    for name in sorted(names):
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        place = int.from_bytes(digest[:4], "little") % places
        while place in taken:
            place = (place + 1) % places
        taken[place] = name
    return {name: place * SEED_SPACING for place, name in taken.items()}


class HeldoutBatch(NamedTuple):
    """A batch and the bytes of text that its scored targets stand for."""

    batch: Batch
    num_bytes: int


def heldout_batches(
    root: str | os.PathLike,
    source: str,
    sequence_length: int,
    batch_rows: int,
    max_rows: int,
) -> Iterator[HeldoutBatch]:
    """At most `max_rows` held-out rows of `source`, evenly spread over it, in a fixed order.

    Every batch has `batch_rows` rows; the last one is filled up with rows of padding, which
    score nothing.
    """
    rows = open_source(root, source, "heldout", sequence_length)
    bytes_V = token_byte_lengths(load_tokenizer(epath.Path(root) / "tokenizer.json"))
    count = min(len(rows), max_rows)
    chosen = [index * len(rows) // count for index in range(count)]
    padding = padding_row(sequence_length)
    for start in range(0, count, batch_rows):
        members = [rows[index] for index in chosen[start : start + batch_rows]]
        members += [padding] * (batch_rows - len(members))
        batch = batch_from_rows(members)
        num_bytes = int(bytes_V[batch.targets_BL][batch.loss_mask_BL].sum())
        yield HeldoutBatch(batch, num_bytes)
