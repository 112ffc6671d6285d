"""int8 weights: error bounds, what calibration gains, and that decoding keeps them int8.

I inputs and O outputs of a matrix, B batch, L sequence, T loops, D model width.
"""

import dataclasses
import functools
import math
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from etils import epath
from flax.core import meta

from ouro_jax.config import from_config_dict
from ouro_jax.errors import ConfigError
from ouro_jax.inference import quantize as module
from ouro_jax.inference.generate import generate
from ouro_jax.inference.quantize import calibration_rows, quantize
from ouro_jax.inference.slots import Program, cast_params, empty_slots, step
from ouro_jax.interop.huggingface import load_huggingface, save_huggingface
from ouro_jax.model.cache import empty_cache
from ouro_jax.model.int8 import LAYER_MATRICES
from ouro_jax.model.loop_lm import LoopLM
from ouro_jax.training.start import check_start

GROUPED = dict(heads=6, kv_heads=2, head_dim=4, hidden=32, mlp=48, vocab=96, layers=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A grouped-query model with random weights: config and float32 parameters."""
    folder = tmp_path_factory.mktemp("model")
    reference.write_checkpoint(
        folder, *reference.random_checkpoint(np.random.default_rng(0), **GROUPED)
    )
    return load_huggingface(folder)


@pytest.fixture(scope="module")
def plain(model):
    return quantize(*model)


def tokens(seed, rows=24):
    """Few of the entries often: inputs that go together, as those of text do."""
    rng = np.random.default_rng(seed)
    return (96 * rng.random((rows, 32)) ** 3).astype(np.int32)


def matrices(params):
    """(name, kernel or pair, number of summed axes) of every quantised matrix, one layer each."""
    layers = params["stack"]["layers"]
    for (part, name), summed in LAYER_MATRICES.items():
        for index in range(GROUPED["layers"]):
            yield name, {key: x[index] for key, x in layers[part][name].items()}, summed
    yield "lm_head", params["lm_head"], 1


def meant(params):
    """The float32 tree that a quantised one stands for."""

    def product(pair, summed, stacked):
        kernel, scale = pair["kernel"], pair["kernel_scale"]
        layers, outputs = scale.shape[:stacked], scale.shape[stacked:]
        return {"kernel": kernel * scale.reshape(*layers, *[1] * summed, *outputs)}

    layers = dict(params["stack"]["layers"])
    for (part, name), summed in LAYER_MATRICES.items():
        layers[part] = {**layers[part], name: product(layers[part][name], summed, 1)}
    head = product(params["lm_head"], 1, 0)
    return {**params, "stack": {**params["stack"], "layers": layers}, "lm_head": head}


def test_plain_rounding_is_within_half_a_scale_of_every_weight(model, plain):
    config, params = model
    for (name, pair, summed), (_, before, _) in zip(matrices(plain), matrices(params), strict=True):
        kernel, scale = np.asarray(pair["kernel"]), np.asarray(pair["kernel_scale"], np.float64)
        weights = np.asarray(before["kernel"], np.float64)
        assert (kernel.dtype, pair["kernel_scale"].dtype) == (np.int8, jnp.float32), name
        assert kernel.shape == weights.shape and scale.shape == weights.shape[summed:], name
        assert (np.abs(weights - kernel * scale) <= scale * (0.5 + 1e-4)).all(), name
        largest = np.abs(weights).max(tuple(range(summed)))
        np.testing.assert_allclose(scale, largest / 127.5, rtol=1e-6, err_msg=name)
    # Grouped queries: 6 heads and 2 KV heads of width 4, two layers.
    attention = plain["stack"]["layers"]["self_attn"]
    assert attention["q_proj"]["kernel_scale"].shape == (2, 6, 4)
    assert attention["v_proj"]["kernel_scale"].shape == (2, 2, 4)
    assert attention["o_proj"]["kernel_scale"].shape == (2, 32)
    assert plain["embed_tokens"] is params["embed_tokens"]
    assert plain["stack"]["norm"] is params["stack"]["norm"]


def test_bfloat16_weights_become_the_numbers_of_their_float32_copies(model):
    config, params = model
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    ours, theirs = quantize(config, low), quantize(config, high)
    for (name, pair, _), (_, other, _) in zip(matrices(ours), matrices(theirs), strict=True):
        jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=name), pair, other)
    assert ours["embed_tokens"]["embedding"].dtype == jnp.bfloat16


def errors_by_loop(config, params, trees, rows_BL, loops):
    """|state error| / |state| of each loop for every one of `trees`, float64 [trees, T]."""

    @jax.jit
    def states(tree):
        return LoopLM(config).apply({"params": tree}, rows_BL, num_loops=loops).states_TBLD

    right = np.asarray(states(params), np.float64)
    errors = [np.asarray(states(tree), np.float64) - right for tree in trees]
    return [np.sqrt((e**2).sum((1, 2, 3)) / (right**2).sum((1, 2, 3))) for e in errors]


def test_calibrated_is_better_on_heldout_tokens_in_every_loop(tmp_path):
    """Norms that favour some channels and branches that add a little, as training makes them."""
    rng = np.random.default_rng(0)
    fields, tensors = reference.random_checkpoint(rng, **GROUPED | {"hidden": 64, "mlp": 96})
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensors[name] = tensor * np.exp(rng.normal(size=tensor.shape)).astype(np.float32)
        elif name.endswith("layernorm_2.weight"):
            tensors[name] = tensor * np.float32(0.3)
    config, params = load_huggingface(reference.write_checkpoint(tmp_path, fields, tensors))
    trees = [quantize(config, params), quantize(config, params, tokens(1, rows=64))]
    plain_T, calibrated_T = errors_by_loop(config, params, trees, tokens(2), loops=8)
    assert (calibrated_T < plain_T).all()
    assert calibrated_T[3:].mean() < 0.85 * plain_T[3:].mean(), (plain_T, calibrated_T)


def correlated(inputs, rng):
    """Second moments of inputs that go together."""
    x_NI = rng.normal(size=(200, inputs)) @ rng.normal(size=(inputs, inputs)) / math.sqrt(inputs)
    return jnp.asarray(x_NI.T @ x_NI / 200, jnp.float32)


@pytest.mark.parametrize("inputs", [256, 48, 7])
def test_no_channel_loses_by_calibration_and_no_single_step_gains_more(inputs, monkeypatch):
    """256 inputs are two blocks, 48 three of 16, 7 seven of one."""
    monkeypatch.setattr(module, "SWEEPS", 40)
    rng = np.random.default_rng(0)
    weights_IO = jnp.asarray(rng.normal(size=(inputs, 20)), jnp.float32)
    moments_II = correlated(inputs, rng)
    # The jitted function under another name, so that 40 sweeps are traced.
    quantised_IO, scale_O = jax.jit(module._calibrated.__wrapped__)(weights_IO, moments_II)
    nearest_IO, plain_O = module._round(weights_IO)
    np.testing.assert_allclose(scale_O, plain_O, rtol=1e-6)
    damped_II = np.asarray(moments_II, np.float64)
    damped_II = damped_II + module.DAMPING * np.diagonal(damped_II).mean() * np.eye(inputs)
    weights_IO, scale_O = np.asarray(weights_IO, np.float64), np.asarray(scale_O, np.float64)

    def cost(numbers_IO):
        error_IO = weights_IO - np.asarray(numbers_IO, np.float64) * scale_O
        return (error_IO * (damped_II @ error_IO)).sum(0)

    best_O = cost(quantised_IO)
    assert (best_O <= cost(nearest_IO) * (1 + 1e-6)).all()
    assert best_O.sum() < 0.8 * cost(nearest_IO).sum()
    numbers_IO = np.asarray(quantised_IO, np.int32)
    for i in range(inputs):
        for move in (-1, 1):
            moved_IO = numbers_IO.copy()
            moved_IO[i] = np.clip(moved_IO[i] + move, -128, 127)
            assert (cost(moved_IO) >= best_O * (1 - 1e-4)).all(), (i, move)


def test_zero_channels_and_inputs_that_are_always_zero_stay_finite():
    weights_IO = jnp.ones((16, 4)).at[:, 1].set(0)
    for moments_II in (jnp.zeros((16, 16)), jnp.eye(16)):
        quantised_IO, scale_O = module._calibrated(weights_IO, moments_II)
        assert np.isfinite(scale_O).all()
        np.testing.assert_allclose(quantised_IO * scale_O, weights_IO, atol=0.005)


def test_generation_is_that_of_the_weights_it_stands_for(model, plain):
    config, _ = model
    prompt = [1, 2, 3, 4]
    answer = generate(config, plain, [prompt], 12).tokens[0]

    @jax.jit
    def next_tokens(params, text_BL):
        run = LoopLM(config).apply
        state_BLD = run({"params": params}, text_BL).states_TBLD[-1]
        return run({"params": params}, state_BLD, method="logits").argmax(-1)

    chosen_BL = next_tokens(meant(plain), jnp.asarray([prompt + answer]))
    assert answer == chosen_BL[0, len(prompt) - 1 : -1].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_keeps_kernels_int8_and_makes_no_float_copy_of_them(dtype, model):
    """A quarter of float32 in the arguments, and nothing like a stack of floats beside them."""
    config = dataclasses.replace(model[0], num_layers=16, hidden_size=128, dtype=dtype)
    init = jax.eval_shape(LoopLM(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    floats = meta.unbox(init)["params"]
    params = jax.eval_shape(lambda tree: cast_params(config, quantize(config, tree)), floats)
    program = Program(config, 4)
    cache = jax.eval_shape(lambda: empty_cache(config, 1, 64, 4))
    slots = jax.eval_shape(lambda: empty_slots(program, 1, 63))
    compiled = step.lower(program, params, cache, slots, 1).compile()

    def size(tree, *names):
        flat = jax.tree_util.tree_leaves_with_path(tree)
        return sum(
            x.size * x.dtype.itemsize
            for path, x in flat
            if not names or {str(getattr(part, "key", "")) for part in path} & set(names)
        )

    kernels = ("self_attn", "mlp", "lm_head")
    ours, theirs = size(params, *kernels), size(floats, *kernels)
    assert 0.25 * theirs < ours < 0.28 * theirs  # the scales are the rest
    layers = params["stack"]["layers"]
    for pair in (params["lm_head"], *layers["self_attn"].values(), *layers["mlp"].values()):
        assert (pair["kernel"].dtype, pair["kernel_scale"].dtype) == (jnp.int8, jnp.float32)
    assert params["stack"]["norm"]["scale"].dtype == dtype
    memory = compiled.memory_analysis()
    held = size(params) + size((cache, slots))
    assert memory.argument_size_in_bytes < held + 4096
    assert memory.temp_size_in_bytes < size(floats["stack"], *kernels) / 4


def test_calibration_rows_fit_the_window_and_too_short_a_text_is_refused(model):
    config, _ = model
    assert calibration_rows(config, list(range(200))).shape == (1, 200)
    assert calibration_rows(config, list(range(100_000))).shape == (64, 512)
    short = dataclasses.replace(config, max_position_embeddings=50)
    rows_BL = calibration_rows(short, list(range(130)))
    np.testing.assert_array_equal(rows_BL, np.arange(100).reshape(2, 50))
    with pytest.raises(ConfigError, match="127 tokens: expected at least 128"):
        calibration_rows(config, [1] * 127)


def test_what_cannot_be_quantised_is_refused(model, plain, monkeypatch):
    config, params = model
    with pytest.raises(ConfigError, match="int8 already"):
        quantize(config, plain)
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"pip install 'ouro_jax\[quantize\]'"):
        quantize(config, params)


def test_training_does_not_start_from_int8_weights(model, plain, tmp_path):
    save_huggingface(model[0], plain, tmp_path)
    tiny = Path(__file__).parents[2] / "configs" / "tiny.py"
    config = from_config_dict(runpy.run_path(str(tiny))["get_config"]())
    config = dataclasses.replace(config, init_from=str(tmp_path))
    with pytest.raises(ConfigError, match="init_from.*quantization_config.*float weights"):
        check_start(config, epath.Path(tmp_path / "run"))
