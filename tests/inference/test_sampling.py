"""Draws against the distributions that they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ouro_jax.inference.sampling import Sampling, limit, row_keys, sample

LOGITS_V = np.array([1.0, -0.5, 2.0, 0.3, -3.0, 1.7], np.float32)


def settings_of(temperature=1.0, top_k=0, top_p=1.0, rows=2):
    return Sampling(
        jnp.full(rows, temperature, jnp.float32), jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
    )  # fmt: skip


def draws(rows=200, steps=100, **sampling):
    """Tokens of many rows and steps over the same logits."""
    logits_BV = jnp.broadcast_to(LOGITS_V, (rows, len(LOGITS_V)))
    asked, keys_B = settings_of(**sampling, rows=rows), row_keys(7, rows)
    draw = jax.jit(lambda step: sample(logits_BV, asked, keys_B, jnp.full(rows, step)))
    return np.stack([draw(step) for step in range(steps)])


def kept_by_hand(logits_V, top_k, top_p):
    """The tokens that top-k, then top-p, keep, one by one in float64; no ties."""
    order = np.argsort(-logits_V)[: top_k or len(logits_V)]
    p = np.exp(logits_V[order].astype(np.float64))
    p /= p.sum()
    kept, collected = [], 0.0
    for token, probability in zip(order, p, strict=True):
        if collected >= top_p:
            break
        kept.append(int(token))
        collected += probability
    return set(kept)


@pytest.mark.parametrize(
    "sampling",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=2.0, top_k=4),
        dict(temperature=1.0, top_p=0.8),
        dict(temperature=1.5, top_k=5, top_p=0.7),
    ],
)
def test_frequencies(sampling):
    scaled_V = LOGITS_V / sampling["temperature"]
    kept = kept_by_hand(scaled_V, sampling.get("top_k", 0), sampling.get("top_p", 1.0))
    p_V = np.array([np.exp(scaled_V[v]) if v in kept else 0.0 for v in range(len(LOGITS_V))])
    p_V /= p_V.sum()
    tokens = draws(**sampling)
    counts_V = np.bincount(tokens.ravel(), minlength=len(LOGITS_V))
    assert set(np.flatnonzero(counts_V)) == kept
    expected_V = p_V[p_V > 0] * tokens.size
    chi_square = ((counts_V[p_V > 0] - expected_V) ** 2 / expected_V).sum()
    # The 0.9999 quantiles of chi-square with 1 … 5 degrees of freedom; the seed is fixed.
    assert chi_square < [15.1, 18.4, 21.1, 23.5, 25.7][len(kept) - 2]


def test_temperature_zero_is_the_first_most_probable_token():
    logits_BV = jnp.array([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert sample(logits_BV, settings_of(0.0), row_keys(0, 2), jnp.zeros(2, int)).tolist() == [1, 0]


def test_rows_and_steps_draw_independently():
    tokens = draws(rows=60, steps=60)
    assert len({tuple(row) for row in tokens}) == len({tuple(row) for row in tokens.T}) == 60


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.0625, 1.0),
)
def test_limit_keeps_what_was_asked_for(seed, top_k, top_p):
    logits_BV = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32) * 3
    out_BV = np.asarray(limit(jnp.asarray(logits_BV), settings_of(1.0, top_k, top_p)))
    for logits_V, out_V in zip(logits_BV, out_BV, strict=True):
        kept = np.flatnonzero(np.isfinite(out_V))
        np.testing.assert_array_equal(out_V[kept], logits_V[kept])
        p_V = np.exp(logits_V.astype(np.float64))
        largest = np.argsort(-logits_V)[: top_k or 8]
        share = p_V[kept].sum() / p_V[largest].sum()
        # Enough to reach p, from the largest down, and one less would not do.
        assert set(kept) == set(largest[: len(kept)])
        assert share >= top_p - 1e-6
        assert len(kept) == 1 or share - p_V[kept].min() / p_V[largest].sum() < top_p + 1e-6


def test_ties_with_the_last_token_kept_are_kept():
    out_BV = limit(jnp.array([[1.0, 1.0, 0.0]]), settings_of(1.0, 1, rows=1))
    assert np.isfinite(np.asarray(out_BV)).tolist() == [[True, True, False]]


def test_every_row_has_its_own_settings():
    """Greedy, free and limited rows in one batch draw what each draws alone."""
    rows = [(0.0, 0, 1.0), (1.0, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.5), (0.7, 4, 0.9)]
    logits_BV = jnp.broadcast_to(LOGITS_V, (len(rows), len(LOGITS_V)))
    together = Sampling(*(jnp.array(column) for column in zip(*rows, strict=True)))
    keys_B, draw = row_keys(3, len(rows)), jax.jit(sample)
    for index in range(40):
        at_B = jnp.full(len(rows), index)
        drawn = draw(logits_BV, together, keys_B, at_B).tolist()
        for row, asked in enumerate(rows):
            mine = slice(row, row + 1)
            alone = draw(logits_BV[mine], settings_of(*asked, rows=1), keys_B[mine], at_B[mine])
            assert alone.tolist() == [drawn[row]]
