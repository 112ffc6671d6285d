"""Programs whose collectives are known by hand; run as a script, compiles them for eight v5e chips.

    python -m tests.planning.compile_collectives DIR

writes `nested.hlo`, `slices.hlo`, `once.hlo` and `each_loop.hlo`. A process of its own: a compiler
that aborts must not take the tests along.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ouro_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from ouro_jax.data.batch import Batch
from ouro_jax.parallel.mesh import batch_sharding, make_mesh, use_mesh
from ouro_jax.training.state import StateFactory
from ouro_jax.training.step import StepSpec, abstract_inputs, compiled_train_step

OUTER, INNER = 5, 3
WIDTH = 512  # the array is WIDTH × WIDTH float32, split over fsdp = 4
MODEL = ModelConfig(1024, 256, 512, 3, 4, 4, 64, num_loops=4, dtype="bfloat16")
MICROBATCHES, ROWS, LENGTH = 2, 16, 128


def mesh_of(devices=None) -> Mesh:
    """data 2 × fsdp 4."""
    return make_mesh(MeshConfig(data=2, fsdp=4), devices)


def lower_nested(mesh: Mesh):
    """Gather and reduce-scatter in two loops; the other kinds, over one axis or two, in one."""

    def inner(part, _):
        whole = lax.all_gather(part, "fsdp", axis=0, tiled=True)
        return lax.psum_scatter(jnp.tanh(whole) + whole.T, "fsdp", tiled=True), None

    def outer(part, _):
        part, _ = lax.scan(inner, part, length=INNER)
        part = lax.ppermute(part, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        part = part + lax.psum(part, "data") + lax.psum(jnp.sin(part), ("data", "fsdp"))
        return jnp.tanh(part) + lax.all_to_all(part, "fsdp", 0, 0, tiled=True), None

    def program(part):
        return lax.scan(outer, part, length=OUTER)[0]

    spec = PartitionSpec("fsdp")
    run = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    array = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, spec))
    platform = mesh.devices.flat[0].platform
    return run.trace(array).lower(lowering_platforms=(platform,))


def lower_between_slices(mesh: Mesh):
    """A sum over slices in a loop, of a float32 array of 128 × 512 on each chip."""

    def program(part):
        return lax.scan(lambda x, _: (jnp.sin(lax.psum(x, "slice")), None), part, length=OUTER)[0]

    spec = PartitionSpec("fsdp")
    run = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    array = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, spec))
    return run.trace(array).lower(lowering_platforms=("tpu",))


def lower_step(mesh: Mesh, gather: str):
    """The small train step: 4 loops of 3 layers, 2 microbatches."""
    sharding, shape = batch_sharding(mesh, microbatched=True), (MICROBATCHES, ROWS, LENGTH)
    ids, mask = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.int32, bool)
    )
    inputs = abstract_inputs(mesh)
    optimizer = OptimizerConfig()
    spec = StepSpec(MODEL, optimizer, "expected", "uniform", "loop_and_layer", gather, mesh)
    state = StateFactory(MODEL, optimizer, "expected", mesh).abstract()
    with use_mesh(mesh):
        traced = compiled_train_step(spec).trace(state, Batch(ids, ids, ids, ids, mask), inputs)
        return traced.lower(lowering_platforms=("tpu",))


def main() -> None:
    """Compiles for `v5e:2x4`, and for two slices of `v5e:2x2`."""
    folder = Path(sys.argv[1])
    mesh = mesh_of(chips("v5e:2x4"))
    slices = make_mesh(MeshConfig(slice=2, data=1, fsdp=4), chips("v5e:2x2", num_slices=2))
    lowered = {"nested": lower_nested(mesh), "slices": lower_between_slices(slices)}
    lowered |= {gather: lower_step(mesh, gather) for gather in ("once", "each_loop")}
    for name, program in lowered.items():
        (folder / f"{name}.hlo").write_text(program.compile().as_text())


def chips(name: str, **options) -> list:
    """TPU devices that need not be there."""
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


if __name__ == "__main__":
    main()
