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

ROWS, HEADS, KV_HEADS = 2, 32, 16


def compile_gradients(mesh, length: int, head_dim: int, manual: bool) -> dict[str, object]:
    """What the compiled program does for one row of each of the batch's shards."""
    model = ModelConfig(64, 64, 64, 1, HEADS, KV_HEADS, head_dim)

    def step(ids, *by_head):
        # As the projections lay them out in memory, heads outside of the length.
        q, k, v, w = (x.swapaxes(1, 2) for x in by_head)
        attend = attention_for(model, length, mesh)
        o, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
        return [x.swapaxes(1, 2) for x in (o, *pullback(w))]

    def shape(*heads, axis="tensor", dtype=jnp.bfloat16):
        spec = PartitionSpec(BATCH_AXES, *[axis for _ in heads], "context")
        width = [head_dim for _ in heads]
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((ROWS, *heads, length, *width), dtype, sharding=sharding)

    if manual:
        by_head = PartitionSpec(BATCH_AXES, None, "context")
        specs = (PartitionSpec(BATCH_AXES, "context"), *[by_head] * 4)
        names = {*BATCH_AXES, "context"}
        step = jax.shard_map(
            step, in_specs=specs, out_specs=by_head, axis_names=names, check_vma=False
        )
    arguments = [shape(heads) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    with use_mesh(mesh):
        traced: Any = jax.jit(step).trace(shape(dtype=jnp.int32), *arguments)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    return {
        "head_dim": head_dim,
        "manual": manual,
        "pallas_calls": text.count('custom_call_target="tpu_custom_call"'),
        "reduce_scatters": text.count("calls=%all-reduce-scatter") + text.count(" reduce-scatter("),
    }


def main() -> None:
    """Both situations with splash attention, then with dense attention."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, context=2), topology.devices)
    for length, head_dim in ((16_384, 128), (256, 16)):
        for manual in (False, True):
            print(json.dumps(compile_gradients(mesh, length, head_dim, manual)))


main()
