"""Upcycling: which layers stand where, and what the upcycled model computes.

T loops, B batch, L sequence, D model width, N layers.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ouro_jax.config import ModelConfig, OptimizerConfig
from ouro_jax.model.attention import dense_attention
from ouro_jax.model.layers import Layer, RMSNorm, rotary_angles
from ouro_jax.model.loop_lm import LoopLM
from ouro_jax.objectives.cross_entropy import cross_entropy
from ouro_jax.objectives.losses import expected_loss
from ouro_jax.training.optimizer import make_optimizer
from ouro_jax.training.transitions import upcycle

OLD = ModelConfig(64, 32, 64, 2, 4, 4, 8, num_loops=4, dtype="float32")
NEW = dataclasses.replace(OLD, num_layers=4, num_loops=2)
ORDERS = {"upcycle_stacked": [0, 1, 0, 1], "upcycle_interleaved": [0, 0, 1, 1]}


@pytest.fixture(scope="module")
def fresh():
    tokens_BL = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(jax.jit(LoopLM(OLD).init)(jax.random.key(0), tokens_BL))["params"]


@pytest.fixture(scope="module")
def params(fresh):
    """Norms of their own for every layer, or a swap of two would not show."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), fresh
    )


@pytest.mark.parametrize("transition", ORDERS)
def test_layers_are_repeated_in_order_and_the_rest_stays(params, transition):
    upcycled = upcycle(params, 2, transition)
    assert jax.tree.structure(upcycled) == jax.tree.structure(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(upcycled):
        old = params
        for entry in path:
            old = old[entry.key]
        if path[1].key == "layers":
            old = np.asarray(old)[ORDERS[transition]]
        np.testing.assert_array_equal(leaf, old)


@pytest.mark.parametrize("transition", ORDERS)
def test_optimizer_moments_move_with_their_layers(params, transition):
    optimizer = make_optimizer(OptimizerConfig(), 1e-3, 0.1)
    # One update with the parameters as gradients: every moment is a multiple of a parameter.
    _, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    upcycled = upcycle(state, 2, transition)
    assert jax.tree.structure(upcycled) == jax.tree.structure(state)
    for kind in ("mu", "nu"):
        moments, old = optax.tree.get(upcycled, kind), optax.tree.get(state, kind)
        jax.tree.map(np.testing.assert_array_equal, moments, upcycle(old, 2, transition))
        assert moments["stack"]["layers"]["mlp"]["up_proj"]["kernel"].shape == (4, 32, 64)
    assert optax.tree.get(upcycled, "count") == 1


@functools.partial(jax.jit, static_argnums=0)
def states(config, params, tokens_BL):
    return LoopLM(config).apply({"params": params}, tokens_BL).states_TBLD


@functools.partial(jax.jit, static_argnums=(0, 3))
def half_by_half(config, params, tokens_BL, inner_norm: bool):
    """States after each loop with every layer called by itself; `inner_norm` puts the final norm
    between the two halves of the stack as well."""
    x_BLD = LoopLM(config).apply({"params": params}, tokens_BL, method="embed")
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    rotary = rotary_angles(positions_BL, config.head_dim, config.rope_theta)
    layer, norm = Layer(config, dense_attention), RMSNorm(config.norm_eps)
    states = []
    for _ in range(config.num_loops):
        for index in range(config.num_layers):
            if inner_norm and index == config.num_layers // 2:
                x_BLD = norm.apply({"params": params["stack"]["norm"]}, x_BLD)
            weights = jax.tree.map(lambda leaf, i=index: leaf[i], params["stack"]["layers"])
            (x_BLD, _), _ = layer.apply(
                {"params": weights}, (x_BLD, None), index, rotary, None, None
            )
        x_BLD = norm.apply({"params": params["stack"]["norm"]}, x_BLD)
        states.append(x_BLD)
    return jnp.stack(states)


def test_stacked_at_half_the_loops_is_the_old_model_but_for_the_norm_between_the_halves(params):
    tokens_BL = jax.random.randint(jax.random.key(2), (2, 9), 0, OLD.vocab_size)
    old_TBLD = states(OLD, params, tokens_BL)
    stacked = upcycle(params, 2, "upcycle_stacked")
    with_norm = half_by_half(NEW, stacked, tokens_BL, True)
    np.testing.assert_allclose(with_norm, old_TBLD[1::2], rtol=1e-5, atol=1e-5)
    # The layers called one by one are the model's: without the norm they give what it gives.
    new_TBLD = states(NEW, stacked, tokens_BL)
    plain = half_by_half(NEW, stacked, tokens_BL, False)
    np.testing.assert_allclose(plain, new_TBLD, rtol=1e-5, atol=1e-5)
    assert np.abs(new_TBLD - old_TBLD[1::2]).max() > 1e-3
    interleaved = half_by_half(NEW, upcycle(params, 2, "upcycle_interleaved"), tokens_BL, True)
    assert np.abs(interleaved - old_TBLD[1::2]).max() > 1e-3


def sequences(rng, count, length=32):
    """Walks on a random graph of 64 nodes with three likely ways out of each: learnable."""
    ways = np.random.default_rng(7).integers(0, 64, (64, 3))
    walk = rng.integers(0, 64, (count, 1))
    for _ in range(length):
        walk = np.append(walk, ways[walk[:, -1], rng.integers(0, 3, count)][:, None], axis=1)
    return walk[:, :-1], walk[:, 1:]


def mean_loss(config, params, tokens_BL, targets_BL):
    out = LoopLM(config, remat="none").apply({"params": params}, tokens_BL)
    ce_TBL = cross_entropy(out.states_TBLD, params["lm_head"]["kernel"], targets_BL)
    sums = expected_loss(ce_TBL, out.gate_logits_TBL, jnp.ones(tokens_BL.shape, bool), 0.1)
    return sums.means()["loss"], sums.means()["expected_loss"]


def test_the_jump_in_loss_of_both_ways_is_printed_and_far_from_a_fresh_start(fresh, capsys):
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, tokens_BL, targets_BL):
        gradient = jax.grad(lambda p: mean_loss(OLD, p, tokens_BL, targets_BL)[0])(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(3)
    trained, state = fresh, optimizer.init(fresh)
    for _ in range(150):
        trained, state = step(trained, state, *sequences(rng, 16))
    evaluate = jax.jit(mean_loss, static_argnums=0)
    unseen = sequences(rng, 64)
    start, before = (float(evaluate(OLD, params, *unseen)[1]) for params in (fresh, trained))
    jumps = {
        way: float(evaluate(NEW, upcycle(trained, 2, way), *unseen)[1]) - before for way in ORDERS
    }
    with capsys.disabled():
        print(
            f"\nloss {start:.3f} fresh, {before:.3f} after 150 steps of 2 layers × 4 loops; "
            + ", ".join(f"{way} {jump:+.4f}" for way, jump in jumps.items())
        )
    assert before < start - 1.5
    assert abs(jumps["upcycle_stacked"]) < 0.1
    assert before + jumps["upcycle_interleaved"] < start - 0.5
