"""The compiled programs of the engine: the cache is updated where it lies and never copied."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from ouro_jax.config import ModelConfig
from ouro_jax.inference.slots import Program, empty_slots, read_piece, step
from ouro_jax.model.cache import empty_cache
from ouro_jax.model.loop_lm import LoopLM, take_layers_apart

# Operations that pass an array on without touching its elements, or write a slice in place.
IN_PLACE = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "dynamic-update-slice"}


def arguments(dtype, batch, num_slots=128, head_dim=8, num_kv_heads=2, kv="full"):
    """Shapes of all that `step` takes, for a grouped-query model of three layers."""
    config = ModelConfig(
        64, 32, 48, 3, 2 * num_kv_heads, num_kv_heads, head_dim, num_loops=4, dtype=dtype
    )
    program = Program(config, 4)
    init = jax.eval_shape(LoopLM(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), meta.unbox(init)["params"]
    )
    cache = jax.eval_shape(lambda: empty_cache(config, batch, num_slots, 4, kv))
    slots = jax.eval_shape(lambda: empty_slots(program, batch, num_slots - 1))
    return program, params, cache, slots


def shape_of(cache):
    """The shape of the cache's arrays as HLO writes it."""
    return ",".join(map(str, cache.keys_CNRGSK.shape))


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


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    "dtype, kv", [("bfloat16", "full"), ("float32", "exited"), ("bfloat16", "mean")]
)
def test_the_cache_is_never_copied(dtype, batch, kv):
    program, params, cache, slots = arguments(dtype, batch, kv=kv)
    params = jax.eval_shape(take_layers_apart, params)
    compiled = step.lower(program, params, cache, slots, batch).compile()
    text = compiled.as_text()
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= kept
    assert len(re.findall(rf"\w+\[{shape_of(cache)}\]\S* parameter\(", text)) >= 2
    assert touches(text, shape_of(cache)) == []


def test_a_piece_of_a_prompt_is_read_into_the_cache_in_place():
    program, params, cache, _ = arguments("float32", 3)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    tokens, loops = jax.ShapeDtypeStruct((1, 64), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    lowered = read_piece.lower(program, params, cache, tokens, one, one, one, loops)
    assert touches(lowered.compile().as_text(), shape_of(cache)) == []


def test_the_check_sees_the_copy_of_a_cache_that_is_not_given_up():
    program, params, cache, slots = arguments("float32", 2)
    keeping = jax.jit(step.__wrapped__, static_argnames=("program", "width"))
    text = keeping.lower(program, params, cache, slots, 2).compile().as_text()
    assert touches(text, shape_of(cache)) != []


@pytest.mark.parametrize("batch, kv", [(1, "full"), (8, "exited")])
def test_the_cache_is_never_copied_on_tpu(monkeypatch, batch, kv):
    """Compiled ahead of time, for no TPU; keys of 384 MiB do not fit into the 128 on the core."""
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    program, *inputs = arguments("bfloat16", batch, 16384 // batch, 128, 8, kv)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    device = SingleDeviceSharding(topology.devices[0])
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), inputs)
    lowered = step.trace(program, *inputs, batch).lower(lowering_platforms=("tpu",))
    compiled = lowered.compile()
    assert touches(compiled.as_text(), shape_of(inputs[1])) == []
    cache_bytes = 2 * inputs[1].keys_CNRGSK.size * 2
    assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes / 8
