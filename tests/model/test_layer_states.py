"""States after every layer of every loop, against the model's own and a model cut short."""

import dataclasses

import jax
import numpy as np
from studied import VOCAB, subject

from ouro_jax.model.layer_states import layer_states
from ouro_jax.model.loop_lm import LoopLM

LENGTHS = np.array([9, 4, 7])


def test_every_layer_of_every_loop():
    config, params = subject().config, subject().params
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(0, VOCAB, (3, 9)).astype(np.int32)
    layers_TNBD, states_TBD = layer_states(config, params, tokens_BL, LENGTHS - 1, 3)
    assert layers_TNBD.shape == (3, 2, 3, 32)
    expected_TBD = loop_states(config, params, tokens_BL)
    np.testing.assert_allclose(states_TBD, expected_TBD, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(normed(layers_TNBD[:, -1], params), expected_TBD, atol=2e-5)
    # The first loop's first layer is the end of a model of that layer alone.
    first = jax.tree.map(lambda leaf: leaf[:1], params["stack"]["layers"])
    short = {**params, "stack": {**params["stack"], "layers": first}}
    cut_BD = loop_states(dataclasses.replace(config, num_layers=1), short, tokens_BL)[0]
    np.testing.assert_allclose(normed(layers_TNBD[0, 0], params), cut_BD, atol=2e-5)
    # What pads a row on the right changes nothing.
    padding_BL = np.arange(9) >= LENGTHS[:, None]
    others_BL = np.where(padding_BL, rng.integers(0, VOCAB, (3, 9)), tokens_BL).astype(np.int32)
    again, _ = layer_states(config, params, others_BL, LENGTHS - 1, 3)
    np.testing.assert_array_equal(again, layers_TNBD)


def loop_states(config, params, tokens_BL):
    run = jax.jit(LoopLM(config).apply, static_argnames="num_loops")
    out = run({"params": params}, tokens_BL, num_loops=3)
    return np.asarray(out.states_TBLD)[:, np.arange(3), LENGTHS - 1]


def normed(x, params):
    x = np.asarray(x, np.float64)
    rms = np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x / rms * np.asarray(params["stack"]["norm"]["scale"])
