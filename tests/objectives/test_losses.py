"""Equations 4 to 6 by hand, in float64, and as sums that packing, masks and splits cannot change.

T loops, B batch, L sequence, D model width, V vocabulary.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from ouro_jax.config import ModelConfig
from ouro_jax.data.batch import batch_from_rows
from ouro_jax.data.rows import Row
from ouro_jax.model.loop_lm import LoopLM
from ouro_jax.objectives.cross_entropy import cross_entropy
from ouro_jax.objectives.losses import (
    expected_loss,
    gate_loss,
    geometric_log_prior,
    last_loop_loss,
)

T, B, L = 4, 3, 5
OBJECTIVES = {
    "expected": lambda *terms: expected_loss(*terms, 0.07),
    "geometric": lambda *terms: expected_loss(*terms, 0.07, 0.3),
    "last_loop": last_loop_loss,
    "gate": gate_loss,
    "gate_lookahead": lambda *terms: gate_loss(*terms, lookahead=True),
}
# One token, three loops: λ = 1/4 and 1/3, so p = 1/4, 3/4 · 1/3 = 1/4, and the rest, 1/2.
HAND_CE = np.array([4.0, 2.0, 1.0], np.float32).reshape(3, 1, 1)
HAND_GATES = np.log(np.array([1 / 3, 1 / 2, 9.0], np.float32)).reshape(3, 1, 1)
ONE_TOKEN = np.ones((1, 1), bool)


@pytest.fixture(scope="module")
def terms():
    rng = np.random.default_rng(1)
    ce_TBL = rng.uniform(0.1, 6, (T, B, L)).astype(np.float32)
    gates_TBL = rng.normal(size=(T, B, L)).astype(np.float32) * 2
    mask_BL = rng.random((B, L)) < 0.6
    assert 0 < mask_BL.sum() < mask_BL.size
    return ce_TBL, gates_TBL, mask_BL


def assert_same_sums(one, other, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), one, other)


def test_equation_4_by_hand():
    sums = expected_loss(HAND_CE, HAND_GATES, ONE_TOKEN, 0.1)
    entropy = 1.5 * math.log(2)  # 1/4 · ln 4 + 1/4 · ln 4 + 1/2 · ln 2
    np.testing.assert_allclose(sums.loss, 2.0 - 0.1 * entropy, rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["expected_loss"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["entropy"], entropy, rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["exit_distribution"], [0.25, 0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["mean_depth"], 2.25, rtol=1e-6)
    np.testing.assert_allclose(sums.metrics["loss_per_loop"], [4, 2, 1])
    assert sums.num_tokens == 1


def test_equation_4_in_float64(terms):
    ce, gates, mask = terms
    pdf = reference.exit_pdf(gates)
    entropy_BL = -(pdf * np.log(pdf)).sum(0)
    loss_BL = (pdf * ce).sum(0) - 0.07 * entropy_BL
    sums = expected_loss(ce, gates, mask, 0.07)
    np.testing.assert_allclose(sums.loss, loss_BL[mask].sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.num_tokens, mask.sum())
    depth_BL = np.einsum("tbl,t->bl", pdf, np.arange(1, T + 1))
    expected = {
        "loss_per_loop": ce[:, mask].sum(-1),
        "exit_distribution": pdf[:, mask].sum(-1),
        "expected_loss": (pdf * ce).sum(0)[mask].sum(),
        "entropy": entropy_BL[mask].sum(),
        "mean_depth": depth_BL[mask].sum(),
    }
    assert sums.metrics.keys() == expected.keys()
    assert_same_sums(sums.metrics, expected)
    means = sums.means()
    np.testing.assert_allclose(means["mean_depth"], depth_BL[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(means["loss"], loss_BL[mask].mean(), rtol=1e-5)


def test_entropy_is_rewarded_and_moves_the_gate_towards_the_uniform_distribution():
    equal = np.ones((2, 1, 1), np.float32)
    gates = np.log(np.array([3.0, 1.0], np.float32)).reshape(2, 1, 1)  # p = 3/4, 1/4

    def loss(gates, weight):
        return expected_loss(equal, gates, ONE_TOKEN, weight).loss

    # d(-H)/dz = p (1-p) ln(p / (1-p)) = 3/16 · ln 3; the last loop's own gate has no part in it.
    slope = jax.grad(loss)(gates, 0.5).flatten()
    np.testing.assert_allclose(slope, [0.5 * 3 / 16 * math.log(3), 0], rtol=1e-5)
    assert loss(gates, 0.5) < loss(gates, 0.0)


def test_geometric_prior_by_hand():
    prior_T = np.exp(geometric_log_prior(0.3, 4))
    np.testing.assert_allclose(prior_T, [0.3, 0.21, 0.147, 0.343], rtol=1e-5)
    for loops in (1, 2, 5, 8):
        np.testing.assert_allclose(np.exp(geometric_log_prior(0.4, loops)).sum(), 1, rtol=1e-6)
    # KL((1/4, 1/4, 1/2) ‖ (1/2, 1/4, 1/4)) = 1/4 ln 1/2 + 1/2 ln 2 = 1/4 ln 2.
    sums = expected_loss(HAND_CE, HAND_GATES, ONE_TOKEN, 0.1, 0.5)
    np.testing.assert_allclose(sums.loss, 2.0 + 0.1 * 0.25 * math.log(2), rtol=1e-6)


def test_the_uniform_prior_is_its_kl_up_to_a_constant(terms):
    ce, gates, mask = terms
    pdf = reference.exit_pdf(gates)
    kl_BL = (pdf * np.log(pdf * T)).sum(0)
    expected = ((pdf * ce).sum(0) + 0.07 * kl_BL - 0.07 * math.log(T))[mask].sum()
    np.testing.assert_allclose(expected_loss(ce, gates, mask, 0.07).loss, expected, rtol=1e-5)


def test_the_last_loop_alone(terms):
    ce, gates, mask = terms
    sums = last_loop_loss(ce, gates, mask)
    np.testing.assert_allclose(sums.loss, ce[-1][mask].sum(), rtol=1e-6)
    slopes = jax.grad(lambda c, g: last_loop_loss(c, g, mask).loss, (0, 1))(ce, gates)
    np.testing.assert_array_equal(slopes[0][-1], mask)
    assert not slopes[0][:-1].any() and not slopes[1].any()


def test_equations_5_and_6_by_hand():
    # Loop 2 improves by 0.025, loop 3 gets worse: w_2 = σ(50 · 0.02) = σ(1), w_3 = σ(-0.25).
    ce = np.array([2.0, 1.975, 1.99], np.float32).reshape(3, 1, 1)
    gates = np.array([5.0, 0.4, -0.7], np.float32).reshape(3, 1, 1)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def bce(target, gate):  # the probability to go on is 1 - λ = σ(-gate)
        return -(target * math.log(sigmoid(-gate)) + (1 - target) * math.log(sigmoid(gate)))

    go_on = sigmoid(1.0), sigmoid(-0.25)
    as_printed = (bce(go_on[0], 0.4) + bce(go_on[1], -0.7)) / 3
    ahead = (bce(go_on[0], 5.0) + bce(go_on[1], 0.4)) / 3
    ours = gate_loss(ce, gates, ONE_TOKEN).loss
    np.testing.assert_allclose(ours, as_printed, rtol=1e-5)
    ours = gate_loss(ce, gates, ONE_TOKEN, lookahead=True).loss
    np.testing.assert_allclose(ours, ahead, rtol=1e-5)
    # Other k and γ: σ(8 · (0.025 - 0.0125)) = σ(0.1) and σ(8 · -0.0125) = σ(-0.1).
    ours = gate_loss(ce, gates, ONE_TOKEN, steepness=8.0, threshold=0.0125).loss
    other = (bce(sigmoid(0.1), 0.4) + bce(sigmoid(-0.1), -0.7)) / 3
    np.testing.assert_allclose(ours, other, rtol=1e-5)


@pytest.mark.parametrize(
    ("lookahead", "untrained"), [(False, 0), (True, T - 1)], ids=["printed", "lookahead"]
)
def test_the_gate_loss_reaches_the_gates_that_it_names_and_no_cross_entropy(
    terms, lookahead, untrained
):
    ce, gates, mask = terms

    def loss(ce, gates):
        return gate_loss(ce, gates, mask, lookahead=lookahead).loss

    into_ce, into_gates = jax.grad(loss, (0, 1))(ce, gates)
    assert not into_ce.any()
    assert not into_gates[untrained].any()
    others = np.delete(into_gates, untrained, axis=0)
    assert (others[:, mask] != 0).all() and not others[:, ~mask].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_masked_tokens_hold_does_not_matter_in_value_or_gradient(terms, name):
    ce, gates, mask = terms
    poisoned = np.where(mask, ce, np.nan), np.where(mask, gates, np.inf)

    def loss(ce, gates):
        sums = OBJECTIVES[name](ce, gates, mask)
        return sums.loss, sums

    def value_and_gradient(ce, gates):
        slopes, sums = jax.grad(loss, (0, 1), has_aux=True)(ce, gates)
        return sums, slopes

    clean_sums, clean_slopes = value_and_gradient(ce, gates)
    sums, slopes = value_and_gradient(*poisoned)
    assert_same_sums(sums, clean_sums)
    for slope, clean in zip(slopes, clean_slopes, strict=True):
        np.testing.assert_array_equal(slope, clean)
        assert not slope[:, ~mask].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_sums_of_two_halves_add_up_to_those_of_the_whole(terms, name):
    ce, gates, mask = terms
    objective = OBJECTIVES[name]
    halves = [
        objective(ce[:, part], gates[:, part], mask[part]) for part in (slice(1), slice(1, B))
    ]
    assert_same_sums(jax.tree.map(jnp.add, *halves), objective(ce, gates, mask))


def test_a_batch_without_a_token_has_means_of_zero(terms):
    ce, gates, mask = terms
    means = expected_loss(ce, gates, np.zeros_like(mask)).means()
    assert all(not np.any(value) for value in means.values())


def test_a_packed_row_is_worth_what_its_documents_are_worth_alone():
    config = ModelConfig(128, 32, 48, 1, 4, 2, 8, num_loops=3, dtype="float32")
    model, rng = LoopLM(config), np.random.default_rng(2)
    params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
    params = jax.tree.map(lambda leaf: 3 * leaf, params)  # far from uniform predictions
    lengths = 7, 1, 4
    tokens = rng.integers(0, 128, sum(lengths) + 3)  # three tokens of padding

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_sums(params, batch):
        out = model.apply({"params": params}, batch.tokens_BL, batch.positions_BL,
                          batch.segment_ids_BL)  # fmt: skip
        ce_TBL = cross_entropy(out.states_TBLD, params["lm_head"]["kernel"], batch.targets_BL, 4)
        terms = ce_TBL, out.gate_logits_TBL, batch.loss_mask_BL
        sums = {name: objective(*terms) for name, objective in OBJECTIVES.items()}
        return sum(one.loss for one in sums.values()), sums

    def of_row(tokens, lengths):
        return gradient_and_sums(params, batch_from_rows([Row(tokens, np.array(lengths))]))

    packed_gradient, packed = of_row(tokens, lengths)
    documents = np.split(tokens, np.cumsum(lengths))[:3]
    alone = [of_row(np.pad(words, (0, 8 - len(words))), [len(words)]) for words in documents]
    gradient, sums = jax.tree.map(lambda *leaves: sum(leaves), *alone)
    assert packed["expected"].num_tokens == sum(lengths) - 3
    assert_same_sums(packed, sums)
    difference = jax.tree.map(jnp.subtract, packed_gradient, gradient)
    assert optax.tree.norm(difference) <= 1e-5 * optax.tree.norm(gradient)
