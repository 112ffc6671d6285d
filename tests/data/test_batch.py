"""Targets, positions, segments and masks against a slow reference."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ouro_jax.data.batch import Batch, batch_from_rows
from ouro_jax.data.rows import Row

LENGTH = 10


@st.composite
def rows(draw) -> Row:
    lengths, left = [], LENGTH
    for length in draw(st.lists(st.integers(1, 6), max_size=5)):
        if length <= left:
            lengths.append(length)
            left -= length
    tokens = draw(st.lists(st.integers(0, 9), min_size=LENGTH, max_size=LENGTH))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH))
    return Row(
        np.array(tokens, np.uint16),
        np.array(lengths, np.uint32),
        None if mask is None else np.array(mask),
    )


def slow_row(row: Row) -> list[tuple]:
    """(token, target, segment, position, scored) of every place, one document at a time."""
    places = []
    for segment, length in enumerate(row.segment_lengths.tolist(), 1):
        for position in range(length):
            here = len(places)
            target, scored = 0, False
            if position + 1 < length:
                target = int(row.tokens[here + 1])
                scored = row.loss_mask is None or bool(row.loss_mask[here + 1])
            places.append((int(row.tokens[here]), target, segment, position, scored))
    return places + [(int(token), 0, 0, 0, False) for token in row.tokens[len(places) :]]


@given(st.lists(rows(), min_size=1, max_size=4))
def test_batch_equals_the_slow_reference(some_rows):
    batch = batch_from_rows(some_rows)
    expected = np.array([slow_row(row) for row in some_rows])
    for got, want in zip(batch, np.moveaxis(expected, -1, 0), strict=True):
        np.testing.assert_array_equal(got, want)
    dtypes = [array.dtype for array in batch]
    assert dtypes == [np.int32] * 4 + [bool]
    assert Batch._fields[-1] == "loss_mask_BL"
