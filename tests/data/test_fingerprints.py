"""Groups of near signatures and sets of hashes, beside what plain Python makes of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ouro_jax.data.fingerprints import first_of_near_duplicates, is_among


@given(st.lists(st.integers(0, 6), max_size=30))
def test_groups_of_equal_signatures(labels):
    distinct = np.random.RandomState(0).randint(0, 2**32, (7, 128), dtype=np.uint32)
    first = first_of_near_duplicates(distinct[np.array(labels, int)], 0.8)
    assert first.tolist() == [labels.index(label) for label in labels]


def test_groups_are_connected_through_their_members():
    """A chain: each agrees with the next in 90 %, the ends in 40 %."""
    chain = np.random.RandomState(0).randint(0, 2**32, (7, 128), dtype=np.uint32)
    for index in range(1, 7):
        fresh = np.arange(13 * (index - 1), 13 * index)
        chain[index] = np.where(np.isin(np.arange(128), fresh), chain[index], chain[index - 1])
    assert (chain[0] == chain[6]).mean() < 0.4
    shuffled = chain[[3, 0, 6, 1, 5, 2, 4]]
    assert first_of_near_duplicates(shuffled, 0.85).tolist() == [0] * 7


@given(st.lists(st.integers(0, 20), max_size=8), st.lists(st.integers(0, 20), max_size=8))
def test_membership_is_that_of_sets(left, right):
    index = np.unique(np.array(right, np.uint64))
    assert is_among(np.array(left, np.uint64), index) == bool(set(left) & set(right))
