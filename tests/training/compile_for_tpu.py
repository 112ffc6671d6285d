"""Compiles the train step for four v5e chips that need not exist; prints one JSON line.

Run by test_program.py in a process of its own: a compiler that aborts must not take the tests
along, and a process can load libtpu with one environment only.
"""

import json

import jax
from jax.experimental import topologies

from ouro_jax.config import MeshConfig, ModelConfig, OptimizerConfig, num_parameters
from ouro_jax.data.batch import Batch
from ouro_jax.parallel.mesh import batch_sharding, make_mesh, use_mesh
from ouro_jax.training.state import StateFactory
from ouro_jax.training.step import StepSpec, abstract_inputs, compiled_train_step

MODEL = ModelConfig(1024, 256, 512, 2, 4, 4, 64, num_loops=4, dtype="bfloat16")
MICROBATCHES, ROWS, LENGTH = 2, 8, 128


def main() -> None:
    """Bytes per device of the program, and optimizer matrices that a device holds whole."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), topology.devices)
    sharding, shape = batch_sharding(mesh, microbatched=True), (MICROBATCHES, ROWS, LENGTH)
    ids, mask = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (int, bool))
    batch = Batch(ids, ids, ids, ids, mask)
    inputs = abstract_inputs(mesh)
    spec = StepSpec(MODEL, OptimizerConfig(), "expected", "uniform", "layer", "each_loop", mesh)
    state = StateFactory(MODEL, OptimizerConfig(), "expected", mesh).abstract()
    step = compiled_train_step(spec)
    with use_mesh(mesh):
        traced = step.trace(state, batch, inputs)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    laid_out = compiled.input_shardings[0][0].opt_state
    leaves = zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(laid_out), strict=True)
    report = {
        "num_parameters": num_parameters(MODEL),
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "whole_matrices": sum(
            leaf.size > MODEL.num_layers * MODEL.hidden_size
            and sharding.shard_shape(leaf.shape) == leaf.shape
            for leaf, sharding in leaves
        ),
    }
    print(json.dumps(report))


main()
