"""A task read through the pipeline of all other data."""

import numpy as np
import pytest

from ouro_jax.data.mixture import heldout_batches, list_sources, open_mixture
from ouro_jax.data.rows import RowSource
from ouro_jax.data.tasks.rows import build_task, make_task, pack_row
from ouro_jax.data.tokenizer import load_tokenizer, token_byte_lengths
from ouro_jax.errors import ConfigError

SETTINGS = {
    "name": "mano", "max_length": 4, "modulus": 5, "loss_on": "answer", "heldout_problems": 50,
    "other_lengths": [5],
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build_task(tmp_path_factory.mktemp("tasks"), SETTINGS, [20])


def test_the_folder_is_a_data_root_like_others(root):
    assert list_sources(root) == {
        "mano": [("heldout", 20), ("train", 20)], "length_5": [("heldout", 20)]
    }  # fmt: skip
    assert build_task(root.parent, SETTINGS, [20]) == root  # nothing is made twice
    assert build_task(root.parent, {**SETTINGS, "seed": 1}, [20]) != root


def test_rows_of_the_mixture_are_those_of_the_task(root):
    task = make_task(SETTINGS)
    mixture = open_mixture(root, {"mano": 1.0}, sequence_length=20, seed=3)
    batch = mixture.read(5, 8)
    again = open_mixture(root, {"mano": 1.0}, sequence_length=20, seed=3).read(9, 2)
    assert np.array_equal(batch.tokens_BL[4:6], again.tokens_BL)
    other = open_mixture(root, {"mano": 1.0}, sequence_length=20, seed=4).read(5, 8)
    assert not np.array_equal(batch.tokens_BL, other.tokens_BL)
    # Targets that count are the answers, and each is in the row behind `<ans>`.
    ans = task.vocabulary["<ans>"]
    assert np.array_equal(batch.tokens_BL == ans, batch.loss_mask_BL)


def test_held_out_rows_hold_a_problem_each(root):
    task = make_task(SETTINGS)
    (batch, num_bytes), *rest = heldout_batches(root, "mano", 20, 50, 50)
    assert not rest and num_bytes > 0
    assert batch.loss_mask_BL.sum(1).tolist() == [1] * 50
    expected = [document.tokens[-1] for document in task.heldout("mano")]
    assert sorted(batch.targets_BL[batch.loss_mask_BL]) == sorted(expected)


def test_the_tokenizer_speaks_the_vocabulary(root):
    tokenizer, task = load_tokenizer(root / "tokenizer.json"), make_task(SETTINGS)
    text = "<bos> <len_1> + 3 4 <ans> 2"
    assert tokenizer.encode(text).ids == task.encode(text.split()).tolist()
    assert tokenizer.get_vocab_size() == len(task.vocabulary) == 15
    lengths = token_byte_lengths(tokenizer)
    assert sum(lengths[tokenizer.encode(text).ids]) == len(text) + 1  # a space behind every word


def test_padding_ends_a_row():
    task = make_task(SETTINGS)
    row = pack_row(task.heldout("mano")[:1], 20)
    assert row.segment_lengths.tolist() == [13] and not row.tokens[13:].any()
    assert isinstance(row.loss_mask, np.ndarray) and row.loss_mask.sum() == 1


@pytest.mark.parametrize(
    ("change", "length", "says"),
    [
        ({"name": "manno"}, 20, "Did you mean 'mano'"),
        ({"max_lenght": 4}, 20, "Did you mean 'max_length'"),
        ({"max_length": "4"}, 20, "expected int"),
        ({}, 19, "sequence_length = 19: expected at least 20"),
    ],
)
def test_wrong_settings(tmp_path, change, length, says):
    with pytest.raises(ConfigError, match=says):
        build_task(tmp_path, SETTINGS | change, [length])


def test_prepared_rows_are_still_read_as_such(root):
    from ouro_jax.data.mixture import open_source

    assert isinstance(open_source(root, "mano", "heldout", 20), RowSource)
