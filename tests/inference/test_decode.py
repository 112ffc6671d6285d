"""The compiled decode program: the cache is updated where it lies and never copied."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from ouro_jax.config import ModelConfig
from ouro_jax.inference.decode import Program, decode, prefill
from ouro_jax.inference.sampling import Sampling, row_keys
from ouro_jax.model.loop_lm import LoopLM

# Operations that pass an array on without touching its elements, or write a slice in place.
IN_PLACE = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "dynamic-update-slice"}


def arguments(dtype, batch, num_slots=128, head_dim=8, num_kv_heads=2):
    """Shapes of all that `decode` takes, for a grouped-query model of three layers."""
    config = ModelConfig(
        64, 32, 48, 3, 2 * num_kv_heads, num_kv_heads, head_dim, num_loops=4, dtype=dtype
    )
    program = Program(config, 4, None, False, num_slots)
    init = jax.eval_shape(LoopLM(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), meta.unbox(init)["params"]
    )
    sampling = Sampling(jnp.float32(0), jnp.int32(0), jnp.float32(1))
    inputs = (jnp.zeros((batch, 64), jnp.int32), jnp.ones(batch, jnp.int32), row_keys(0, batch))
    cache, rows = jax.eval_shape(lambda params: prefill(program, params, *inputs, sampling), params)
    return program, params, cache, rows, jax.eval_shape(lambda: sampling)


def shape_of(cache):
    """The shape of the cache's arrays as HLO writes it."""
    return ",".join(map(str, cache.keys_TNBSGK.shape))


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
    program, params, cache, rows, sampling = arguments(dtype, batch)
    compiled = decode.lower(program, params, cache, rows, sampling).compile()
    text = compiled.as_text()
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert aliases and aliases[1].count("may-alias") == 2  # keys and values
    assert compiled.memory_analysis().alias_size_in_bytes == sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)
    )
    assert len(re.findall(rf"\w+\[{shape_of(cache)}\]\S* parameter\(", text)) >= 2
    assert touches(text, shape_of(cache)) == []


def test_the_check_sees_the_copy_of_a_cache_that_is_not_given_up():
    program, params, cache, rows, sampling = arguments("float32", 2)
    step = jax.jit(decode.__wrapped__, static_argnames="program")
    text = step.lower(program, params, cache, rows, sampling).compile().as_text()
    assert touches(text, shape_of(cache)) != []


@pytest.mark.parametrize("batch", [1, 8])
def test_the_cache_is_never_copied_on_tpu(monkeypatch, batch):
    """Compiled ahead of time, for no TPU; keys of 384 MiB do not fit into the 128 on the core."""
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    program, *inputs = arguments("bfloat16", batch, 16384 // batch, head_dim=128, num_kv_heads=8)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    device = SingleDeviceSharding(topology.devices[0])
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), inputs)
    lowered = decode.trace(program, *inputs).lower(lowering_platforms=("tpu",))
    compiled = lowered.compile()
    assert touches(compiled.as_text(), shape_of(inputs[1])) == []
    cache_bytes = 2 * inputs[1].keys_TNBSGK.size * 2
    assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes / 8
