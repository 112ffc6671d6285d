"""The cached path of the model against the full forward, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from ouro_jax.config import ModelConfig
from ouro_jax.interop.huggingface import load_huggingface
from ouro_jax.model.cache import (
    KV_POLICIES,
    PER_LOOP,
    Address,
    condense,
    empty_cache,
    read,
    stand_in,
    write,
)
from ouro_jax.model.loop_lm import LoopLM

close = dict(rtol=0, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 3, 1)])
def test_pieces_through_the_cache_equal_the_full_forward(tmp_path, kv_heads, pieces):
    fields, tensors = reference.random_checkpoint(
        np.random.default_rng(kv_heads), heads=4, kv_heads=kv_heads, head_dim=6
    )
    config, params = load_huggingface(reference.write_checkpoint(tmp_path, fields, tensors))
    tokens_BL = np.random.default_rng(1).integers(0, fields["vocab_size"], (3, 9))
    expected = reference.forward(fields, tensors, tokens_BL)
    model = LoopLM(config)
    loop = jax.jit(lambda *args: model.apply({"params": params}, *args, method="loop"))
    # More slots than tokens: what lies in the others must not matter.
    cache = jax.tree.map(
        lambda x: x + jnp.asarray(0.5).view(x.dtype),
        empty_cache(config, 3, 16, config.num_loops),
    )
    start = 0
    for length in pieces:
        stop = start + length
        x_BLD = model.apply({"params": params}, tokens_BL[:, start:stop], method="embed")
        positions_BL = jnp.broadcast_to(jnp.arange(start, stop), (3, length))
        for index in range(config.num_loops):
            x_BLD, gates_BL, cache = loop(x_BLD, index, positions_BL, cache)
            np.testing.assert_allclose(x_BLD, expected.states_TBLD[index, :, start:stop], **close)
            np.testing.assert_allclose(
                gates_BL, expected.gate_logits_TBL[index, :, start:stop], **close
            )
        start = stop


def test_rows_at_their_own_loops_equal_rows_in_step(tmp_path):
    """A batch whose rows stand at different loops, in other rows of the cache than their own."""
    fields, tensors = reference.random_checkpoint(np.random.default_rng(0), kv_heads=2)
    config, params = load_huggingface(reference.write_checkpoint(tmp_path, fields, tensors))
    tokens_BL = np.random.default_rng(1).integers(0, fields["vocab_size"], (3, 5))
    expected = reference.forward(fields, tensors, tokens_BL)
    model, rows_B = LoopLM(config), jnp.array([4, 0, 2])
    cache = empty_cache(config, 6, 64, config.num_loops)
    embedded_B1D = model.apply({"params": params}, tokens_BL[:, :1], method="embed")
    x_B1D, loop_B, at_B = embedded_B1D, np.array([0, 0, 0]), np.array([0, 0, 0])
    run = jax.jit(lambda *args: model.apply({"params": params}, *args, method="loop"))
    for turn in range(3 * 4 * 5):
        moves_B = np.arange(3) == turn % 3 if turn < 5 else np.ones(3, bool)
        # A row that does not move writes what it wrote before once more.
        new_B1D, _, cache = run(x_B1D, loop_B, at_B[:, None], cache, rows_B)
        for row in np.flatnonzero(moves_B & (at_B < 5)):
            state_D = expected.states_TBLD[loop_B[row], row, at_B[row]]
            np.testing.assert_allclose(new_B1D[row, 0], state_D, **close)
            x_B1D = x_B1D.at[row].set(new_B1D[row])
            loop_B[row] += 1
            if loop_B[row] == 4:
                loop_B[row], at_B[row] = 0, at_B[row] + 1
                token = tokens_BL[row : row + 1, min(at_B[row], 4)][None]
                x_B1D = x_B1D.at[row].set(model.apply({"params": params}, token, method="embed")[0])
    assert (at_B >= 5).all()


def some_cache(config, policy, rows=3, slots=8):
    return empty_cache(config, rows, slots, 4, policy)


def all_rows(cache_CNRGSK, policy, layer, address, seen, dtype):
    """What each row of a batch of three reads."""
    dtype = jnp.dtype(dtype)
    return jnp.stack(
        [
            read(cache_CNRGSK, policy, jnp.array(layer), address, row, seen, dtype)
            for row in range(3)
        ]
    )


def small_config(dtype="float32"):
    return ModelConfig(64, 32, 48, 2, 4, 2, 6, num_loops=4, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", KV_POLICIES)
def test_a_write_changes_its_own_slots_only_and_comes_back_exactly(dtype, policy):
    config = small_config(dtype)
    cache_CNRGSK = some_cache(config, policy).keys_CNRGSK
    starts, rows, loops = (0, 5, 3), (2, 0, 1), (0, 2, 3)
    positions_BL = jnp.array([[start, start + 1] for start in starts])
    address = Address(jnp.array(loops), jnp.array(rows), positions_BL, jnp.array(8))
    new_BLGK = jax.random.normal(jax.random.key(0), (3, 2, 2, 6), dtype)
    after_CNRGSK = write(cache_CNRGSK, new_BLGK, policy, jnp.array(1), address)
    read_BGSK = all_rows(after_CNRGSK, policy, 1, address, 8, dtype)
    others = np.array(after_CNRGSK)
    for index in range(3):
        expected_GSK = np.zeros((2, 8, 6), dtype)
        written_GLK = new_BLGK[index].swapaxes(0, 1)
        # Into empty slots: a later loop leaves the first's, and a mean counts the loops before.
        if policy == "first" and loops[index] > 0:
            written_GLK = 0 * written_GLK
        if policy == "mean":
            written_GLK = (written_GLK.astype(jnp.float32) / (loops[index] + 1)).astype(dtype)
        expected_GSK[:, starts[index] : starts[index] + 2] = written_GLK
        np.testing.assert_array_equal(read_BGSK[index], expected_GSK)
        others[loops[index] if policy in PER_LOOP else 0, 1, rows[index]] = 0
    assert read_BGSK.dtype == dtype and not others.any()


def test_a_mean_forgets_what_a_slot_held_even_if_it_is_no_number():
    config = small_config()
    keys = jnp.full_like(some_cache(config, "mean").keys_CNRGSK, jnp.nan)
    new_BLGK = jax.random.normal(jax.random.key(0), (3, 1, 2, 6))
    rows_B, positions_BL = jnp.arange(3), jnp.zeros((3, 1), jnp.int32)
    for loop in range(3):
        address = Address(jnp.full(3, loop), rows_B, positions_BL, jnp.array(1))
        keys = write(keys, new_BLGK * (loop + 1), "mean", jnp.array(0), address)
    read_BGSK = all_rows(keys, "mean", 0, address, 1, "float32")
    np.testing.assert_allclose(read_BGSK[:, :, 0], 2 * new_BLGK[:, 0], rtol=1e-6)


def test_the_exit_loop_stands_in_for_deeper_ones_of_rows_that_leave():
    cache = some_cache(small_config(), "exited")
    keys = jax.random.normal(jax.random.key(1), cache.keys_CNRGSK.shape)
    cache = cache.replace(keys_CNRGSK=keys, values_CNRGSK=keys + 1)
    rows_B, loop_B, positions_B = jnp.array([2, 0]), jnp.array([1, 0]), jnp.array([7, 3])
    filled = stand_in(cache, rows_B, loop_B, positions_B, jnp.array([True, False]))
    expected = np.array(keys)
    expected[2:, :, 2, :, 7] = expected[1, :, 2, :, 7]
    np.testing.assert_array_equal(filled.keys_CNRGSK, expected)
    np.testing.assert_array_equal(filled.values_CNRGSK, expected + 1)


@pytest.mark.parametrize("policy, loops", [("last", 3), ("first", 3), ("mean", 3), ("mean", 4)])
def test_a_filled_row_is_condensed_into_its_place(policy, loops):
    config = small_config()
    filled = empty_cache(config, 1, 8, 4)
    exact_TN1GSK = np.random.default_rng(0).normal(size=filled.keys_CNRGSK.shape)
    exact = jnp.asarray(exact_TN1GSK, jnp.float32)
    filled = filled.replace(keys_CNRGSK=exact, values_CNRGSK=exact)
    cache = condense(filled, some_cache(config, policy), jnp.array(1), loops, jnp.dtype("float32"))
    expected_NGSK = {
        "last": exact_TN1GSK[loops - 1, :, 0],
        "first": exact_TN1GSK[0, :, 0],
        "mean": exact_TN1GSK[:loops, :, 0].mean(0),
    }[policy]
    for array in (cache.keys_CNRGSK, cache.values_CNRGSK):
        np.testing.assert_allclose(array[0, :, 1], expected_NGSK, rtol=1e-6, atol=1e-7)
        assert not array[0, :, jnp.array([0, 2])].any()
