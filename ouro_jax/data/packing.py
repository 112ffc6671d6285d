"""Token documents into rows of fixed length: best fit decreasing, within a bounded window.

Documents longer than a row are cut into consecutive pieces; a document that fits is never cut.
Every token lands in exactly one row.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ouro_jax.data.rows import Row

# The window bounds memory (2^24 tokens: 64 MiB of int32) and is still 256 rows at the longest
# row of the curriculum, 65,536.
WINDOW_TOKENS = 1 << 24


class Document(NamedTuple):
    """Token ids of one document; `loss_mask` (same length) marks tokens to learn, None all."""

    tokens: np.ndarray
    loss_mask: np.ndarray | None = None


def pack(
    documents: Iterable[Document], sequence_length: int, window_tokens: int = WINDOW_TOKENS
) -> Iterator[Row]:
    """Packs `documents` into rows of `sequence_length` tokens; empty documents are dropped.

    Documents are gathered until they hold `window_tokens`, then packed; no row holds documents
    of two windows. Within a row documents keep their order, and the pieces of a cut document
    are in consecutive order of rows. The result depends on nothing but the arguments.
    """
    window: list[Document] = []
    tokens = 0
    for document in documents:
        for start in range(0, len(document.tokens), sequence_length):
            piece = slice(start, start + sequence_length)
            mask = None if document.loss_mask is None else document.loss_mask[piece]
            window.append(Document(document.tokens[piece], mask))
        tokens += len(document.tokens)
        if tokens >= window_tokens:
            yield from _pack_window(window, sequence_length)
            window, tokens = [], 0
    yield from _pack_window(window, sequence_length)


def _pack_window(pieces: Sequence[Document], sequence_length: int) -> Iterator[Row]:
    for members in best_fit([len(piece.tokens) for piece in pieces], sequence_length):
        yield _row([pieces[index] for index in members], sequence_length)


def _row(pieces: Sequence[Document], sequence_length: int) -> Row:
    lengths = np.array([len(piece.tokens) for piece in pieces], np.uint32)
    tokens = np.zeros(sequence_length, np.int32)
    tokens[: lengths.sum()] = np.concatenate([piece.tokens for piece in pieces])
    masks = [piece.loss_mask for piece in pieces if piece.loss_mask is not None]
    if not masks:
        return Row(tokens, lengths)
    loss_mask = np.zeros(sequence_length, bool)
    loss_mask[: lengths.sum()] = np.concatenate(masks)
    return Row(tokens, lengths, loss_mask)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which pieces go together: indices into `lengths`, a list per row, each list ascending.

    Longest piece first, each into the fullest row that still has space for it. Rows are in the
    order of their last piece, which keeps the pieces of a cut document in order: all but the
    last fill a row alone.
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # free places -> rows that have exactly so many
    spaces: list[int] = []  # the keys of with_space, ascending: at most `capacity` of them
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = lengths[index]
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        rows[row].append(index)
        left = space - length
        if left and left not in with_space:
            bisect.insort(spaces, left)
        if left:
            with_space.setdefault(left, []).append(row)
    return sorted((sorted(row) for row in rows), key=lambda row: row[-1])
