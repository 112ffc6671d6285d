"""The compiled decode program: the cache is updated where it lies and never copied."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from ouro_jax.config import ModelConfig
from ouro_jax.inference.decode import Program, decode, prefill
from ouro_jax.inference.sampling import Sampling, row_keys
from ouro_jax.model.loop_lm import LoopLM

# Operations that pass an array on without touching its elements, or write a slice in place.
IN_PLACE = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "dynamic-update-slice"}


def lowered(step, dtype, batch):
    """`step` for a grouped-query model, lowered; and the cache's shape as HLO writes it."""
    config = ModelConfig(64, 32, 48, 3, 4, 2, 8, num_loops=4, dtype=dtype)
    program = Program(config, 4, None, False, num_slots=128)
    init = jax.eval_shape(LoopLM(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), meta.unbox(init)["params"]
    )
    sampling = Sampling(jnp.float32(0), jnp.int32(0), jnp.float32(1))
    inputs = (jnp.zeros((batch, 64), jnp.int32), jnp.ones(batch, jnp.int32), row_keys(0, batch))
    cache, rows = jax.eval_shape(lambda params: prefill(program, params, *inputs, sampling), params)
    shape = ",".join(map(str, cache.keys_TNBSGK.shape))
    return step.lower(program, params, cache, rows, sampling), shape


def touches(text, shape):
    """Instructions that make a whole array of the cache's shape other than in place."""
    found = []
    roots = dict(
        re.findall(r"^%(\S+) \([^\n]*\{\n(?:(?!^\}).*\n)*?  ROOT ([^\n]*)\n\}", text, re.M)
    )
    fused = set(re.findall(r"fusion\(.*?calls=%(\S+?)[,\s]", text))
    computation = ""
    for line in text.splitlines():
        if line.endswith("{"):
            computation = line.removeprefix("ENTRY ").removeprefix("%").split(" ")[0]
        made = re.search(rf"= \w+\[{shape}\]\S* ([\w-]+)\(", line)
        if not made or computation in fused or made[1] in IN_PLACE:
            continue
        called = re.search(r"calls=%(\S+?)[,\s]", line)
        if made[1] == "fusion" and called and " dynamic-update-slice(" in roots[called[1]]:
            continue
        found.append(line.strip())
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 8])
def test_the_cache_is_never_copied(dtype, batch):
    step, shape = lowered(decode, dtype, batch)
    compiled = step.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert aliases and aliases[1].count("may-alias") == 2  # keys and values
    assert len(re.findall(rf"\w+\[{shape}\]\S* parameter\(", text)) >= 2
    assert touches(text, shape) == []
    cache_bytes = 2 * 4 * 3 * batch * 128 * 2 * 8 * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes or batch == 1


def test_the_check_sees_a_copy():
    step = jax.jit(decode.__wrapped__, static_argnames="program")
    text = lowered(step, "float32", 2)[0].compile().as_text()
    assert touches(text, lowered(step, "float32", 2)[1]) != []
