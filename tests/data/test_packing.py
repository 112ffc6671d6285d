"""Packing loses nothing, cuts only what must be cut, and wastes little."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ouro_jax.data.packing import Document, best_fit, pack

LENGTHS = st.lists(st.integers(0, 40), max_size=60)


def documents_of(lengths: list[int], masked: bool = False) -> list[Document]:
    """Documents whose tokens are all different: 0, 1, 2, … through all of them."""
    documents, first = [], 0
    for length in lengths:
        tokens = np.arange(first, first + length)
        documents.append(Document(tokens, tokens % 3 == 0 if masked else None))
        first += length
    return documents


def pieces_of(rows) -> list[list[int]]:
    """The token runs of all rows, in order of rows."""
    pieces = []
    for row in rows:
        borders = np.cumsum(row.segment_lengths)[:-1].astype(int)
        used = int(row.segment_lengths.sum())
        pieces += [piece.tolist() for piece in np.split(row.tokens[:used], borders)]
    return pieces


@given(LENGTHS, st.integers(1, 16), st.integers(1, 200))
def test_each_token_is_in_exactly_one_row_and_documents_stay_whole(lengths, length, window):
    documents = documents_of(lengths)
    rows = list(pack(documents, length, window))
    pieces = pieces_of(rows)
    # Joining each document's pieces in the order of rows gives the document back.
    owner = np.repeat(np.arange(len(lengths)), lengths)
    joined: dict[int, list[int]] = {}
    for piece in pieces:
        joined.setdefault(int(owner[piece[0]]), []).extend(piece)
    expected = {i: d.tokens.tolist() for i, d in enumerate(documents) if len(d.tokens)}
    assert joined == expected
    # Only documents longer than a row are cut, into full rows and one rest.
    assert len(pieces) == sum(-(-n // length) for n in lengths)
    assert all(row.tokens.shape == (length,) for row in rows)


@given(LENGTHS, st.integers(1, 16))
def test_masks_travel_with_their_tokens(lengths, length):
    for row in pack(documents_of(lengths, masked=True), length):
        used = int(row.segment_lengths.sum())
        assert (row.loss_mask[:used] == (row.tokens[:used] % 3 == 0)).all()
        assert not row.loss_mask[used:].any()


@given(st.lists(st.integers(1, 16), max_size=60))
def test_best_fit_leaves_no_two_rows_that_would_fit_together(lengths):
    rows = best_fit(lengths, 16)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[index] for index in row) for row in rows)
    assert all(total <= 16 for total in sums)
    assert len(sums) < 2 or sums[0] + sums[1] > 16


def test_less_than_two_percent_of_ordinary_text_is_padding():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 3000).astype(int).tolist()
    for length in (512, 4096):
        rows = list(pack(documents_of(lengths), length))
        padding = 1 - sum(lengths) / (len(rows) * length)
        print(f"rows of {length}: {padding:.2%} padding")
        assert padding < 0.02


def test_windows_are_packed_apart_and_bound_what_is_held():
    taken = []

    def documents():
        for document in documents_of([8] * 100):
            taken.append(document)
            yield document

    rows = pack(documents(), 16, window_tokens=64)
    next(rows)
    assert len(taken) == 8
    assert len(list(rows)) == 49
