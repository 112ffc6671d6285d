"""Compiles one program for devices that need not be there; a process of its own, see `compile.py`.

  python -m ouro_jax.planning.programs FOLDER

reads a pickled `Request` from its input and writes FOLDER/result.json and FOLDER/hlo.txt.gz.
"""

import dataclasses
import gzip
import json
import pickle
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from ouro_jax.config import ModelConfig, OptimizerConfig
from ouro_jax.data.batch import Batch
from ouro_jax.errors import ConfigError
from ouro_jax.inference.slots import (
    PIECES,
    Program,
    cast_params,
    empty_slots,
    read_piece,
    step,
)
from ouro_jax.model.cache import empty_cache
from ouro_jax.parallel.chips import GIB
from ouro_jax.parallel.mesh import batch_sharding, batch_shards, make_mesh, use_mesh
from ouro_jax.planning.topologies import Topology, devices
from ouro_jax.training.layout import Layout
from ouro_jax.training.state import StateFactory, abstract_params, replicated
from ouro_jax.training.step import StepSpec, abstract_inputs, compiled_train_step

PROGRAMS = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Request:
    """All that decides a compiled program; equal requests are compiled once.

    `prefill` and `decode` run on one chip, without layout, beside a cache of `rows` rows of
    `sequence_length` slots: a piece of one prompt, and one loop of all rows with its read-out. In
    training `rows` are microbatches.
    """

    program: str
    topology: Topology
    model: ModelConfig
    sequence_length: int
    rows: int
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: str = "expected"
    prior: str = "uniform"
    layout: Layout | None = None


def lower(request: Request, all_devices: list[Any]) -> tuple[Any, dict[str, Any]]:
    """The lowered program, and what is known of it before it is compiled."""
    if request.program == "train":
        return _lower_train(request, all_devices)
    return _lower_answer(request, all_devices[0])


def _lower_train(request: Request, all_devices: list[Any]) -> tuple[Any, dict[str, Any]]:
    assert request.layout is not None, "training is laid out on a mesh"
    layout, mesh = request.layout, make_mesh(request.layout.mesh, all_devices)
    spec = StepSpec(
        request.model, request.optimizer, request.objective, request.prior, layout.remat,
        layout.gather, mesh,
    )  # fmt: skip
    state = StateFactory(request.model, request.optimizer, request.objective, mesh).abstract()
    rows = layout.microbatch_rows * batch_shards(mesh)
    ids, mask = (
        jax.ShapeDtypeStruct(
            (request.rows, rows, request.sequence_length), dtype,
            sharding=batch_sharding(mesh, microbatched=True),
        )
        for dtype in (jnp.int32, jnp.bool)
    )  # fmt: skip
    inputs = abstract_inputs(mesh)
    with use_mesh(mesh):
        traced = compiled_train_step(spec).trace(state, Batch(ids, ids, ids, ids, mask), inputs)
        lowered = traced.lower(lowering_platforms=(_platform(mesh),))
    return lowered, {
        "mesh": dict(mesh.shape),
        "parameter_bytes": _bytes_per_chip(state.params),
        "optimizer_bytes": _bytes_per_chip(state.opt_state),
        "replicated_matrices": _replicated_matrices(state.opt_state, request.model, mesh),
    }


def _lower_answer(request: Request, device: Any) -> tuple[Any, dict[str, Any]]:
    model, batch, slots = request.model, request.rows, request.sequence_length
    mesh = Mesh(np.array([device]), ("one",))
    here = replicated(mesh)

    def abstract(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree
        )

    def cast(params: Any) -> Any:
        return cast_params(model, params)

    params = abstract(jax.eval_shape(cast, abstract_params(model)))
    program = Program(model, model.num_loops)
    cache = abstract(jax.eval_shape(lambda: empty_cache(model, batch, slots, model.num_loops)))
    if request.program == "prefill":
        one = abstract(jnp.zeros(1, jnp.int32))
        piece = abstract(jnp.zeros((1, min(slots, PIECES[0])), jnp.int32))
        loops = abstract(jnp.int32(0))
        traced = read_piece.trace(program, params, cache, piece, one, one, one, loops)
    else:
        taken = abstract(jax.eval_shape(lambda: empty_slots(program, batch, slots - 1)))
        traced = step.trace(program, params, cache, taken, batch)
    return traced.lower(lowering_platforms=(_platform(mesh),)), {
        "mesh": {},
        "parameter_bytes": _bytes_per_chip(params),
        "cache_bytes": _bytes_per_chip(cache),
    }


def _platform(mesh: Mesh) -> str:
    return {"tpu": "tpu", "gpu": "cuda", "cuda": "cuda"}[mesh.devices.flat[0].platform]


def _bytes_per_chip(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _replicated_matrices(opt_state: Any, model: ModelConfig, mesh: Mesh) -> int:
    """Moments of matrices that every chip holds whole although the mesh could split them."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return 0
    return sum(
        leaf.size > model.num_layers * model.hidden_size
        and leaf.sharding.shard_shape(leaf.shape) == leaf.shape
        for leaf in jax.tree.leaves(opt_state)
    )


def compile_request(request: Request, folder: Path) -> dict[str, Any]:
    """Compiles, writes the program's text into `folder`, and returns what the compiler says.

    A program that the compiler refuses has `fits` false, the reason and, where it is memory, the
    bytes it would need.
    """
    start = time.perf_counter()
    lowered, known = lower(request, devices(request.topology))
    lowered_at = time.perf_counter()
    known["lower_seconds"] = lowered_at - start
    try:
        compiled = lowered.compile()
    except JaxRuntimeError as error:
        known["compile_seconds"] = time.perf_counter() - lowered_at
        return known | {"fits": False, **refusal(str(error))}
    known["compile_seconds"] = time.perf_counter() - lowered_at
    memory = compiled.memory_analysis()
    with gzip.open(folder / "hlo.txt.gz", "wt", compresslevel=3) as file:
        file.write(compiled.as_text())
    peak, granted = memory.peak_memory_in_bytes, request.topology.granted_bytes
    # TPU's compiler refuses such a program itself.
    reason = f"The peak is {peak / GIB:.2f} GiB." if peak > granted else None
    return known | {
        "fits": reason is None,
        "reason": reason,
        "peak_bytes": peak,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }


def refusal(message: str) -> dict[str, Any]:
    """Why the compiler refused: the first lines, and the bytes needed if memory was short."""
    # Of HBM; there are smaller memories to run out of.
    forms = r"Used ([\d.]+)([KMGT]) of \S+ hbm", r"HLO temporaries \(([\d.]+)([KMGT])\)"
    used = next(filter(None, (re.search(form, message) for form in forms)), None)
    needed = float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1) if used else None
    reason = " ".join(message.split("\n\n")[0].split())
    return {"reason": reason[:600], "peak_bytes": needed}


def main() -> None:
    """Entry point of the child process."""
    folder = Path(sys.argv[1])
    try:
        result = compile_request(pickle.load(sys.stdin.buffer), folder)
    except ConfigError as error:
        result = {"config_error": str(error)}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
