"""Packing changes nothing: rows as `pack` makes them, against each document run alone.

T loops, B batch, L sequence.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ouro_jax.config import ModelConfig
from ouro_jax.data.batch import batch_from_rows
from ouro_jax.data.packing import Document, pack
from ouro_jax.model.loop_lm import LoopLM
from ouro_jax.objectives.cross_entropy import cross_entropy
from ouro_jax.objectives.losses import Sums, expected_loss

LENGTH = 24
# Shorter than a row, as long as one, longer than two; rows get one to four documents.
LENGTHS = (9, 5, LENGTH, 5, 9, 1, 2 * LENGTH + 5, 9, 9, 5)
CONFIG = ModelConfig(128, 32, 48, 2, 4, 2, 8, num_loops=3, dtype="float32")


@pytest.fixture(scope="module")
def params():
    """Parameters whose predictions are far from uniform."""
    initial = jax.jit(LoopLM(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(lambda leaf: 3 * leaf, nn.unbox(initial)["params"])


@jax.jit
def terms(params, tokens_BL, targets_BL, positions_BL=None, segment_ids_BL=None):
    """Cross-entropy and gate logits [T, B, L]."""
    out = LoopLM(CONFIG).apply({"params": params}, tokens_BL, positions_BL, segment_ids_BL)
    head = params["lm_head"]["kernel"]
    return cross_entropy(out.states_TBLD, head, targets_BL), out.gate_logits_TBL


def documents(with_masks):
    rng = np.random.default_rng(3)
    for length in LENGTHS:
        mask = rng.random(length) < 0.5 if with_masks else None
        yield Document(rng.integers(0, CONFIG.vocab_size, length).astype(np.int32), mask)


@pytest.mark.parametrize("with_masks", [False, True], ids=["text", "chat"])
def test_the_loss_of_packed_rows_is_that_of_their_documents_alone(params, with_masks):
    rows = list(pack(documents(with_masks), LENGTH))
    batch = batch_from_rows(rows)
    ce_TBL, gates_TBL = terms(
        params, batch.tokens_BL, batch.targets_BL, batch.positions_BL, batch.segment_ids_BL
    )
    packed = expected_loss(ce_TBL, gates_TBL, batch.loss_mask_BL)

    alone: list[Sums] = []
    for index, row in enumerate(rows):
        ends = np.cumsum(row.segment_lengths)
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            tokens = row.tokens[start:end]
            # Nothing of the batch but the tokens: no positions, no segments, targets by hand.
            ce, gates = terms(params, tokens[None], np.append(tokens[1:], 0)[None])
            learnt = (
                np.ones(end - start, bool) if row.loss_mask is None else row.loss_mask[start:end]
            )
            counted = np.append(learnt[1:], False)
            alone.append(expected_loss(ce, gates, counted[None]))
            here = (slice(None), index, slice(start, end))
            close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
            close(gates_TBL[here], gates[:, 0])
            close(ce_TBL[here][:, :-1], ce[:, 0, :-1])
            np.testing.assert_array_equal(batch.loss_mask_BL[index, start:end], counted)
            # Attention is relative: the loss alone would not see positions that run on.
            np.testing.assert_array_equal(batch.positions_BL[index, start:end], range(end - start))

    assert len(alone) == len(LENGTHS) + 2 and max(len(row.segment_lengths) for row in rows) >= 3
    assert packed.num_tokens > 30
    total = jax.tree.map(lambda *sums: sum(sums), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), packed, total)
