"""Rows damaged on the disk: named, counted once, replaced by padding, and nothing else moves.

B rows, L sequence.
"""

import contextlib
import json
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from micro_run import ROW, micro_config
from prepared import write_rows

from ouro_jax.config import MeshConfig, OptimizerConfig
from ouro_jax.data.bad_rows import BadRows, UnreadableRow
from ouro_jax.data.batch import Batch
from ouro_jax.data.mixture import Mixture
from ouro_jax.data.rows import MANIFEST, Row, open_rows
from ouro_jax.data.tokenizer import tokenizer_hash
from ouro_jax.errors import ConfigError
from ouro_jax.parallel.mesh import batch_sharding, make_mesh, use_mesh
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.stage_rows import open_stage_mixture
from ouro_jax.training.state import StateFactory
from ouro_jax.training.step import StepInputs, StepSpec, compiled_train_step

# Two epochs of every source, by the shares of the micro run.
ROWS, SHARD_ROWS, STEP_ROWS, READ = {"code": 64, "math": 32, "prose": 32}, 32, 8, 256
FLIPPED_BYTES = (1000, 2000, 3000)  # each in the chunk of another record


@pytest.fixture
def root(tmp_path) -> Path:
    """Three sources of rows that differ, each of one or two documents and some padding."""
    (tmp_path / "tokenizer.json").write_text("{}")
    rng = np.random.default_rng(0)
    for source, count in ROWS.items():
        rows = [
            Row(rng.integers(0, 300, ROW), rng.integers(1, ROW // 2, 1 + i % 2).astype(np.uint32))
            for i in range(count)
        ]
        write_rows(
            tmp_path / source / f"train-{ROW}", rows, sequence_length=ROW, vocab_size=300,
            tokenizer_hash=tokenizer_hash(tmp_path / "tokenizer.json"), source=source,
            rows_per_shard=SHARD_ROWS,
        )  # fmt: skip
    return tmp_path


def open_micro(root: Path, bad_rows: BadRows | None = None) -> Mixture:
    config = micro_config(root)
    plan = StagePlan("stable_1a", config.stages["stable_1a"])
    return open_stage_mixture(config, root, plan, bad_rows)


def read(mixture: Mixture, host: int = 0, num_hosts: int = 1) -> Batch:
    """All that a host reads, in steps that are read ahead by two threads, as one batch."""
    steps = mixture.batches(
        0, lambda row: STEP_ROWS if row < READ else 0, host=host, num_hosts=num_hosts
    )
    with contextlib.closing(steps):
        parts = [batch for _, batch in steps]
    return Batch(*map(np.concatenate, zip(*parts, strict=True)))


def damaged_shard(root: Path) -> Path:
    """The last of two, so that a record's number is not its row's."""
    return root / "code" / f"train-{ROW}" / "rows-00001.array_record"


def flip(path: Path, places) -> None:
    content = bytearray(path.read_bytes())
    for place in places:
        content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": lambda path: flip(path, FLIPPED_BYTES),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "removed": lambda path: path.unlink(),
}


def assert_only_replaced(batch: Batch, intact: Batch) -> np.ndarray:
    """Which rows of `batch` are all padding; the others are those of `intact`."""
    replaced = ~batch.segment_ids_BL.any(1)
    assert intact.segment_ids_BL.any(1).all()
    for ours, expected in zip(batch, intact, strict=True):
        np.testing.assert_array_equal(ours[~replaced], expected[~replaced])
        assert not ours[replaced].any()  # the loss mask too
    return replaced


def test_an_unreadable_row_is_named_and_ends_the_reading_without_a_ledger(root):
    shard = damaged_shard(root)
    flip(shard, FLIPPED_BYTES[:1])
    mixture = open_micro(root)
    with pytest.raises(UnreadableRow, match="cannot be read .*hash mismatch") as caught:
        read(mixture)
    error = caught.value
    assert (error.source, error.shard) == ("code", str(shard))
    assert f"{shard}, record {error.record}: " in str(error)
    assert f"`ouro data verify {shard.parent}`" in str(error)
    again = pickle.loads(pickle.dumps(error))  # as from a process of a pool
    assert (str(again), again.record) == (str(error), error.record)


@pytest.mark.parametrize("limit", [0, 2])
def test_one_row_more_than_the_limit_ends_the_run_and_says_which(root, limit):
    shard = damaged_shard(root)
    flip(shard, FLIPPED_BYTES[: limit + 1])
    told: list[dict[str, Any]] = []
    with pytest.raises(ConfigError) as caught:
        read(open_micro(root, BadRows(limit, told.append)))
    assert len(told) == limit + 1
    for part in (
        f"{shard}, record {told[-1]['record']}: cannot be read ({told[-1]['reason']})",
        f"so far: {limit + 1}, data.max_bad_rows = {limit}.",
        f"`ouro data verify {shard.parent}`",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_rows_become_padding_on_any_number_of_hosts(root, damage, num_hosts):
    shard = damaged_shard(root)
    stored = {row.tokens.tobytes(): i for i, row in enumerate(open_rows(shard.parent))}
    intact, told = read(open_micro(root)), []
    # A ledger for each host, as each is a process of its own; the limit is just kept.
    damaged = len(FLIPPED_BYTES) if damage == "flipped" else SHARD_ROWS
    hosts = [open_micro(root, BadRows(damaged, told.append)) for _ in range(num_hosts)]
    DAMAGES[damage](shard)

    whole = jax.tree.map(np.zeros_like, intact)
    for host, mixture in enumerate(hosts):
        for all_rows, own_rows in zip(whole, read(mixture, host, num_hosts), strict=True):
            all_rows[host::num_hosts] = own_rows
    replaced = assert_only_replaced(whole, intact)
    records = {record["record"] for record in told}
    lost = [stored[row.astype(np.uint16).tobytes()] for row in intact.tokens_BL[replaced]]
    expected = sorted(SHARD_ROWS + record for record in [*records, *records])  # two epochs
    assert len(records) == damaged and sorted(lost) == expected
    for record in told:
        assert record.keys() == {"source", "shard", "record", "reason"} and record["reason"]
        assert (record["source"], record["shard"]) == ("code", str(shard))
    if num_hosts == 1:
        assert len(told) == damaged  # both epochs met it, and it was told once


def test_content_that_does_not_fit_the_manifest_is_not_trained_on(root):
    """Records that are whole, but hold a token beyond the vocabulary or too long documents."""
    directory = damaged_shard(root).parent
    rows = list(open_rows(directory))
    highest = np.array([row.tokens.max() for row in rows])
    rows[3] = rows[3]._replace(segment_lengths=np.array([ROW, 1], np.uint32))
    write_rows(
        directory, rows, sequence_length=ROW, vocab_size=300, source="code",
        tokenizer_hash=tokenizer_hash(root / "tokenizer.json"), rows_per_shard=SHARD_ROWS,
    )  # fmt: skip
    manifest = json.loads((directory / MANIFEST).read_text())
    vocab_size = int(highest.max())
    (directory / MANIFEST).write_text(json.dumps(manifest | {"vocab_size": vocab_size}))
    source, bad = open_rows(directory), {}
    for index in range(len(rows)):
        try:
            source[index]
        except UnreadableRow as error:
            bad[index] = error.reason
    assert bad.keys() == {3, *np.flatnonzero(highest >= vocab_size).tolist()} and len(bad) > 1
    assert f"{ROW + 1} tokens in a row of {ROW}" in bad[3]
    assert f"highest id {vocab_size} of a vocabulary of {vocab_size}" in bad.popitem()[1]


class SlowName(str):
    """A path during whose look-up in a set other threads go on: a race without a lock is lost."""

    def __hash__(self) -> int:
        time.sleep(1e-3)
        return super().__hash__()


def test_threads_that_meet_the_same_record_at_once_tell_of_it_once():
    told: list[dict[str, Any]] = []
    ledger, barrier = BadRows(5, told.append), threading.Barrier(8)

    def meet() -> None:
        barrier.wait()
        for record in range(5):
            ledger.skip(UnreadableRow("web", SlowName("web/rows-00000"), record, "torn"))

    threads = [threading.Thread(target=meet) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record["record"] for record in told) == list(range(5))
    # The same number of another shard or source is another record.
    with pytest.raises(ConfigError, match=r"web/rows-00001, record 0: .*so far: 6, .* = 5"):
        ledger.skip(UnreadableRow("web", "web/rows-00001", 0, "torn"))


def test_a_replaced_row_adds_nothing_to_a_step_and_a_step_of_them_is_finite(root):
    mixture = open_micro(root, BadRows(SHARD_ROWS, lambda _: None))
    damaged_shard(root).unlink()
    batch = read(mixture)
    replaced = ~batch.segment_ids_BL.any(1)
    bad, good = int(replaced.argmax()), int((~replaced).argmax())
    model, mesh = micro_config(root).model, make_mesh(MeshConfig(), jax.devices()[:1])
    factory = StateFactory(model, OptimizerConfig(), "expected", mesh)
    step = compiled_train_step(
        StepSpec(model, OptimizerConfig(), "expected", "uniform", "none", "each_loop", mesh)
    )

    def metrics(*rows: int) -> dict[str, Any]:
        chosen = jax.tree.map(lambda x_BL: x_BL[None, list(rows)], batch)
        inputs = StepInputs(*map(np.float32, (1e-3, 0.1, 0.05, 1e4)))
        with use_mesh(mesh):
            placed = jax.device_put(chosen, batch_sharding(mesh, microbatched=True))
            state, found = step(factory.init(0), placed, inputs)
        assert found["accepted"]  # which a loss or gradient that is not finite would not be
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
        return jax.device_get(found)

    alone, twice, none = metrics(good, bad), metrics(good, good), metrics(bad, bad)
    assert 2 * alone["num_tokens"] == twice["num_tokens"] > 0 == none["num_tokens"]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(alone[name], twice[name], rtol=1e-4)
        assert none[name] == 0
