"""The chunked cross-entropy against plain float64 softmax, in value and in gradient.

T loops, B batch, L sequence, D model width, V vocabulary.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ouro_jax.objectives.cross_entropy import cross_entropy

T, B, L, D, V = 3, 2, 7, 8, 19
# Chunks of 1, 2, 4 and 7 positions: 2 and 4 do not divide 7.
CHUNK_TOKENS = (1, 4, 10, 1024)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    states_TBLD = rng.normal(size=(T, B, L, D)).astype(np.float32)
    head_DV = rng.normal(size=(D, V)).astype(np.float32)
    return states_TBLD, head_DV, rng.integers(0, V, (B, L)), rng.normal(size=(T, B, L))


def plain_float64(states_TBLD, head_DV, targets_BL):
    logits_TBLV = np.asarray(states_TBLD, np.float64) @ np.asarray(head_DV, np.float64)
    log_sum_TBL = np.log(np.exp(logits_TBLV).sum(-1))
    return log_sum_TBL - np.stack(
        [[[row[p, t] for p, t in enumerate(targets_BL[b])] for b, row in enumerate(loop)]
         for loop in logits_TBLV]
    )  # fmt: skip


def plain_jax(states_TBLD, head_DV, targets_BL):
    log_pdf_TBLV = jax.nn.log_softmax(states_TBLD @ head_DV)
    return -jnp.take_along_axis(log_pdf_TBLV, targets_BL[None, ..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk_tokens", CHUNK_TOKENS)
def test_values_are_those_of_a_plain_softmax_in_float64(case, chunk_tokens):
    states, head, targets, _ = case
    ce_TBL = cross_entropy(states, head, targets, chunk_tokens)
    assert ce_TBL.shape == (T, B, L) and ce_TBL.dtype == jnp.float32
    np.testing.assert_allclose(ce_TBL, plain_float64(states, head, targets), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", CHUNK_TOKENS)
def test_gradients_are_exact_with_a_weight_of_its_own_for_every_token_and_loop(case, chunk_tokens):
    states, head, targets, weights_TBL = case

    def gradients(function):
        return jax.grad(lambda s, h: jnp.sum(weights_TBL * function(s, h)), (0, 1))(states, head)

    ours = gradients(lambda s, h: cross_entropy(s, h, targets, chunk_tokens))
    plain = gradients(lambda s, h: plain_jax(s, h, targets))
    for our, expected in zip(ours, plain, strict=True):
        np.testing.assert_allclose(our, expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_central_differences_in_float64(case):
    states, head, targets, weights_TBL = case

    def value(states, head):
        return np.sum(weights_TBL * plain_float64(states, head, targets))

    ours = jax.grad(lambda s, h: jnp.sum(weights_TBL * cross_entropy(s, h, targets, 4)), (0, 1))
    ours = ours(states, head)
    step = 1e-5
    for argument, index in itertools.product((0, 1), range(0, D * V, 13)):
        ends = []
        for sign in (1, -1):
            moved = [states.astype(np.float64), head.astype(np.float64)]
            moved[argument].flat[index] += sign * step
            ends.append(value(*moved))
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(ours[argument].flatten()[index], slope, rtol=1e-4, atol=1e-5)


def test_bfloat16_states_give_float32_losses_near_the_exact_ones(case):
    states, head, targets, _ = case
    rounded = jnp.asarray(states, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    ours = cross_entropy(rounded[0], head, targets, 6)
    assert ours.dtype == jnp.float32
    # Only the inputs are rounded: the products add up in float32.
    exact = plain_float64(*(np.asarray(x, np.float64) for x in rounded), targets)
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


def test_logits_in_the_hundreds_stay_finite(case):
    states, head, targets, _ = case
    ce_TBL = cross_entropy(300 * states, head, targets)
    assert np.isfinite(ce_TBL).all() and (np.asarray(ce_TBL) >= 0).all()


def test_the_gradient_of_a_float32_head_is_summed_in_float32_over_bfloat16_chunks():
    keys = jax.random.split(jax.random.key(0), 3)
    states_TBLD = jax.random.normal(keys[0], (4, 4, 512, 64))
    head_DV = 0.1 * jax.random.normal(keys[1], (64, 256))
    targets_BL = jax.random.randint(keys[2], (4, 512), 0, 256)

    def head_gradient(states, chunk_tokens):
        return jax.grad(lambda head: cross_entropy(states, head, targets_BL, chunk_tokens).sum())(
            head_DV
        )

    exact = head_gradient(states_TBLD, 2048)
    # 512 chunks: 0.0022 off from rounding the factors; 0.0122 when the sums are bfloat16 too.
    rounded = head_gradient(states_TBLD.astype(jnp.bfloat16), 16)
    assert jnp.linalg.norm(rounded - exact) < 0.004 * jnp.linalg.norm(exact)
