"""The cached path of the model against the full forward, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from ouro_jax.interop.huggingface import load_huggingface
from ouro_jax.model.cache import empty_cache, write_and_read
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_write_changes_its_own_slots_only_and_comes_back_exactly(tmp_path, dtype):
    fields, tensors = reference.random_checkpoint(np.random.default_rng(0), kv_heads=2)
    fields["torch_dtype"] = dtype
    config, _ = load_huggingface(reference.write_checkpoint(tmp_path, fields, tensors))
    cache_TNBSGK = empty_cache(config, batch=3, num_slots=8, num_loops=4).keys_TNBSGK
    positions_BL = jnp.array([[0, 1], [5, 6], [3, 4]])
    shape = (3, 2, config.num_kv_heads, config.head_dim)
    new_BLGK = jax.random.normal(jax.random.key(0), shape, dtype)
    after_TNBSGK, slot_BSGK = write_and_read(cache_TNBSGK, new_BLGK, 2, 1, positions_BL)
    expected_BSGK = np.zeros((3, 8, *shape[2:]), dtype)
    for row in range(3):
        expected_BSGK[row, positions_BL[row]] = new_BLGK[row]
    np.testing.assert_array_equal(slot_BSGK, expected_BSGK)
    assert slot_BSGK.dtype == new_BLGK.dtype
    others = np.array(after_TNBSGK)
    others[2, 1] = 0
    assert not others.any()
