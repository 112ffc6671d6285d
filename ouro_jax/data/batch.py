"""What the model is fed: packed rows as one batch of arrays, targets made on the host.

B rows of the batch, L sequence. Targets are made here, so that a sequence split over devices
needs no token of its neighbour.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ouro_jax.data.rows import Row

Array = Any
"""np.ndarray as the host makes it, jax.Array once placed on devices."""


class Batch(NamedTuple):
    """Arrays of shape [B, L]; all int32, the mask bool.

    `segment_ids_BL` is 0 for padding and 1, 2, … for the documents of a row; `positions_BL`
    restarts at 0 in every document. `targets_BL` is the next token of the same document;
    `loss_mask_BL` is False where there is none (the last token of a document, padding) and, in
    chat data, where the target is not the assistant's; targets without a next token are 0.
    """

    tokens_BL: Array
    targets_BL: Array
    segment_ids_BL: Array
    positions_BL: Array
    loss_mask_BL: Array


def batch_from_rows(rows: Sequence[Row]) -> Batch:
    """The batch of `rows`, which all have the same length."""
    tokens_BL = np.stack([row.tokens for row in rows]).astype(np.int32)
    num_rows, length = tokens_BL.shape
    segment_ids_BL, positions_BL = _segments(rows, length)

    targets_BL = np.zeros_like(tokens_BL)
    loss_mask_BL = np.zeros((num_rows, length), bool)
    continues = (segment_ids_BL[:, :-1] == segment_ids_BL[:, 1:]) & (segment_ids_BL[:, :-1] > 0)
    targets_BL[:, :-1] = np.where(continues, tokens_BL[:, 1:], 0)
    loss_mask_BL[:, :-1] = continues
    for row, mask_L in zip(rows, loss_mask_BL, strict=True):
        if row.loss_mask is not None:
            mask_L[:-1] &= row.loss_mask[1:]
    return Batch(tokens_BL, targets_BL, segment_ids_BL, positions_BL, loss_mask_BL)


def _segments(rows: Sequence[Row], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions [B, L]: all segments of all rows in one flat repeat.

    Padding is one more segment at the end of its row, with id 0 and positions 0.
    """
    lengths, ids = [], []
    for row in rows:
        count = len(row.segment_lengths)
        lengths += [row.segment_lengths, [length - int(row.segment_lengths.sum())]]
        ids += [np.arange(1, count + 1), [0]]
    lengths, ids = np.concatenate(lengths), np.concatenate(ids)
    starts = np.cumsum(lengths) - lengths
    segment_ids = np.repeat(ids, lengths)
    positions = np.arange(len(segment_ids)) - np.repeat(starts, lengths)
    positions[segment_ids == 0] = 0
    shape = (len(rows), length)
    return segment_ids.astype(np.int32).reshape(shape), positions.astype(np.int32).reshape(shape)
