"""Rows by number: the same on any number of hosts, shares exact, epochs whole, errors clear."""

import contextlib
import shutil
import threading
from collections import Counter

import numpy as np
import pytest

from ouro_jax.config import ConfigError
from ouro_jax.data.batch import batch_from_rows
from ouro_jax.data.mixture import (
    SEED_SPACING,
    heldout_batches,
    list_sources,
    open_mixture,
    open_source,
    source_seeds,
)
from ouro_jax.data.tokenizer import token_byte_lengths

WEIGHTS = {"code": 0.5, "prose": 0.3, "sft": 0.2}


@pytest.fixture(scope="module")
def mixture(embedded_root):
    return open_mixture(embedded_root, WEIGHTS, sequence_length=64, seed=3)


def multiset(batch) -> Counter:
    """The rows of a batch, each as bytes of all its arrays, however they are ordered."""
    return Counter(b"".join(array[i].tobytes() for array in batch) for i in range(len(batch[0])))


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
@pytest.mark.parametrize("around_epoch_end", [False, True])
def test_the_union_of_all_hosts_is_the_same_at_every_step_of_a_ramp(
    mixture, num_hosts, around_epoch_end
):
    rows = mixture.describe()["sft"].rows
    first = int(rows / WEIGHTS["sft"]) - 40 if around_epoch_end else 24
    located = [mixture.locate(index) for index in range(first, first + 132)]
    epochs = {row // rows for source, row in located if source == "sft"}
    assert epochs == ({0, 1} if around_epoch_end else {0})

    def ramp(position: int) -> int:
        done = position - first
        return 0 if done >= 132 else 4 if done < 20 else 8 if done < 60 else 12

    position = first
    streams = [mixture.batches(first, ramp, host=i, num_hosts=num_hosts) for i in range(num_hosts)]
    for parts in zip(*streams, strict=True):
        assert {start for start, _ in parts} == {position}
        assert {len(batch.tokens_BL) for _, batch in parts} == {ramp(position) // num_hosts}
        union = sum((multiset(batch) for _, batch in parts), Counter())
        assert union == multiset(mixture.read(position, ramp(position)))
        position += ramp(position)
    assert position == first + 132


def test_reading_does_not_depend_on_what_was_read_before(mixture):
    whole = mixture.read(0, 40)
    for start in (32, 8, 0):
        for part, all_rows in zip(mixture.read(start, 8), whole, strict=True):
            np.testing.assert_array_equal(part, all_rows[start : start + 8])
    mixture.row(7 * 10**9 + 1)


def test_shares_are_exact_wherever_one_counts(embedded_root):
    weights = {"code": 0.4975, "prose": 0.5025 - 0.03, "math": 0.03}
    mixture = open_mixture(embedded_root, weights, sequence_length=64, seed=0)
    located = [mixture.locate(index) for index in range(20_000)]
    given = {name: [row for source, row in located if source == name] for name in weights}
    for name, weight in weights.items():
        assert given[name] == list(range(len(given[name])))  # none left out, none twice
        assert abs(len(given[name]) / 20_000 - weight) < 2e-4


def test_every_epoch_of_a_source_has_each_row_once_in_another_order(embedded_root):
    mixture = open_mixture(embedded_root, {"sft": 1.0}, sequence_length=64, seed=0)
    rows = mixture.describe()["sft"].rows
    stored = [row.tokens.tobytes() for row in open_source(embedded_root, "sft", "train", 64)]
    epochs = [
        [mixture.row(epoch * rows + i).tokens.tobytes() for i in range(rows)] for epoch in range(2)
    ]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(stored)
    assert epochs[0] != epochs[1] and epochs[0] != stored


def test_the_seed_changes_the_order_and_nothing_else_does(embedded_root):
    def first_rows(seed, weights):
        mixture = open_mixture(embedded_root, weights, sequence_length=64, seed=seed)
        return multiset(mixture.read(0, 8))

    assert first_rows(1, {"code": 1.0}) == first_rows(1, {"code": 1.0})
    assert first_rows(1, {"code": 1.0}) == first_rows(1, {"code": 1.0, "math": 0.0})
    assert first_rows(1, {"code": 1.0}) != first_rows(2, {"code": 1.0})


def test_no_two_sources_share_a_permutation():
    names = {f"source-{i}": None for i in range(400)}
    for seed in range(20):
        seeds = np.sort(list(source_seeds(names, seed).values()))
        assert len(seeds) == len(names)  # 400 names in 65,536 places do collide for some seeds
        assert np.diff(seeds).min() >= SEED_SPACING and 0 <= seeds[0] <= seeds[-1] < 2**32
    assert source_seeds(names, 0)["source-5"] == source_seeds({"source-5": None}, 0)["source-5"]


def test_closing_ends_the_reading_threads(mixture):
    before = threading.active_count()
    with contextlib.closing(mixture.batches(0, lambda position: 4)) as batches:
        next(batches)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_heldout_batches_have_a_fixed_order_a_full_shape_and_their_bytes(embedded_root, tokenizer):
    bytes_V = token_byte_lengths(tokenizer)
    stored = batch_from_rows(list(open_source(embedded_root, "sft", "heldout", 64)))
    rows = len(stored.tokens_BL)
    first = list(heldout_batches(embedded_root, "sft", 64, 4, 10))
    second = list(heldout_batches(embedded_root, "sft", 64, 4, 10))
    assert rows > 10 and len(first) == 3
    for (batch, num_bytes), (again, _) in zip(first, second, strict=True):
        assert multiset(batch) == multiset(again)
        assert batch.tokens_BL.shape == (4, 64)
        scored = batch.targets_BL[batch.loss_mask_BL]
        assert num_bytes == sum(int(bytes_V[target]) for target in scored) > 0
    assert not first[-1].batch.segment_ids_BL[2:].any()  # 10 rows in batches of 4
    chosen = np.concatenate([batch.tokens_BL for batch, _ in first])[:10]
    np.testing.assert_array_equal(chosen, stored.tokens_BL[[i * rows // 10 for i in range(10)]])
    everything = list(heldout_batches(embedded_root, "sft", 64, 8, 10**9))
    assert len(everything) == -(-rows // 8)


@pytest.mark.parametrize(
    ("weights", "options", "error"),
    [
        ({"cod": 1.0}, {}, r"no source 'cod'.*code, math, prose, sft.*Did you mean 'code'\?"),
        ({"code": 0.5, "math": 0.6}, {}, "sum to one; these sum to 1.1"),
        ({"code": 1.5, "math": -0.5}, {}, "shares of 0 or more"),
        ({"code": 1.0}, {"sequence_length": 128}, "have 32, 64.*longer than the data rows"),
        ({"code": 1.0}, {"sequence_length": 48}, "sequence_length = 48.*have 32, 64.$"),
        ({"code": 1.0}, {"split": "test"}, "no 'test' rows of this length; there is none"),
        (
            {"code": 1.0},
            {"expected_vocab_size": 512},
            "tokenizer.json has 300 entries, model.vocab_size = 512",
        ),
    ],
)
def test_mistakes_are_named(embedded_root, weights, options, error):
    options = {"sequence_length": 64, "seed": 0, **options}
    with pytest.raises(ConfigError, match=error):
        open_mixture(embedded_root, weights, **options)


def test_data_of_another_tokenizer_or_none_is_refused(embedded_root, tmp_path):
    with pytest.raises(ConfigError, match="no prepared data there"):
        open_source(tmp_path, "math", "train", 64)
    root = tmp_path / "root"
    shutil.copytree(embedded_root / "math", root / "math")
    with pytest.raises(ConfigError, match="tokenizer.json: no such tokenizer"):
        open_source(root, "math", "train", 64)
    (root / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="another tokenizer"):
        open_source(root, "math", "train", 64)
    (root / "math" / "train-64").rename(root / "math" / "train-32")
    shutil.copy(embedded_root / "tokenizer.json", root)
    with pytest.raises(ConfigError, match="rows have 64 tokens, the folder's name says 32"):
        open_source(root, "math", "train", 32)


def test_a_batch_that_the_hosts_cannot_share_is_refused(mixture):
    with pytest.raises(ConfigError, match="6 rows .* among 4 hosts"):
        mixture.read(0, 6, 0, 4)


def test_sources_are_listed_with_their_splits_and_lengths(embedded_root):
    found = list_sources(embedded_root)
    assert list(found) == ["code", "math", "prose", "sft"]
    assert found["code"] == [("heldout", 32), ("heldout", 64), ("train", 32), ("train", 64)]
