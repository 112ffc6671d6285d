"""Compiles attention and its gradients for eight v5e chips that need not exist.

Run by test_attention.py in a process of its own: a compiler that aborts must not take the tests
along. Prints a JSON line for each way in which a step calls attention: all axes automatic or most
manual, with heads for splash attention or too narrow for it.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from ouro_jax.config import MeshConfig, ModelConfig
from ouro_jax.parallel.attention import attention_for
from ouro_jax.parallel.mesh import BATCH_AXES, make_mesh, use_mesh

ROWS, LENGTH, HEADS, KV_HEADS = 2, 1024, 8, 4


def compile_gradients(mesh, head_dim: int, manual: bool) -> dict[str, object]:
    """What the compiled program does for one row of each of the batch's shards."""
    model = ModelConfig(64, 64, 64, 1, HEADS, KV_HEADS, head_dim)
    rows = PartitionSpec(BATCH_AXES, "context")

    def shape(*sizes, dtype=jnp.bfloat16):
        heads = ["tensor"] if len(sizes) == 4 else []
        sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context", *heads))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    def step(q, k, v, ids, w):
        attend = attention_for(model, LENGTH, mesh)
        o, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
        return o, pullback(w)

    q = shape(ROWS, LENGTH, HEADS, head_dim)
    kv = shape(ROWS, LENGTH, KV_HEADS, head_dim)
    ids = shape(ROWS, LENGTH, dtype=jnp.int32)
    if manual:
        names = {*BATCH_AXES, "context"}
        step = jax.shard_map(step, in_specs=rows, out_specs=rows, axis_names=names, check_vma=False)
    with use_mesh(mesh):
        traced: Any = jax.jit(step).trace(q, kv, kv, ids, q)
        lowered = traced.lower(lowering_platforms=("tpu",))
        text = lowered.compile().as_text()
    return {
        "head_dim": head_dim,
        "manual": manual,
        "pallas_calls": text.count('custom_call_target="tpu_custom_call"'),
        # Asked for; the compiler reduces small arrays over two devices as it likes.
        "reduce_scatters": lowered.as_text().count("stablehlo.reduce_scatter"),
    }


def main() -> None:
    """Both situations with splash attention, then with dense attention."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, context=2), topology.devices)
    for head_dim in (128, 16):
        for manual in (False, True):
            print(json.dumps(compile_gradients(mesh, head_dim, manual)))


main()
