"""How a stage's step is laid out on devices: mesh, gather, remat, rows of a microbatch."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ouro_jax.config import MESH_AXES, Config, MeshConfig
from ouro_jax.parallel.mesh import batch_shards, check_model_fits, make_mesh
from ouro_jax.training.curriculum import StagePlan, microbatch_rows


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with every axis set, `once` or `each_loop`, a remat policy, rows per batch shard."""

    mesh: MeshConfig
    gather: str
    remat: str
    microbatch_rows: int


def choose_layout(config: Config, name: str, devices: Sequence[Any] | None = None) -> Layout:
    """The layout of stage `name` on `devices`; keys of the config that are set are kept.

    Raises ConfigError where the mesh does not match the devices, the model or the batch.
    """
    mesh = make_mesh(config.mesh, devices)
    stage = config.stages[name]
    rows = microbatch_rows(
        StagePlan(name, stage), batch_shards(mesh), config.layout.microbatch_rows
    )
    check_model_fits(config.stage_model(name), stage.sequence_length, mesh, f"stages.{name}")
    shape = MeshConfig(**{axis: mesh.shape[axis] for axis in MESH_AXES})
    shards = math.prod((shape.slice, shape.data, shape.fsdp))
    gather, remat = config.layout.gather, config.layout.remat
    return Layout(
        shape,
        gather if gather != "auto" else "each_loop",
        remat if remat != "auto" else "layer",
        rows // shards,
    )
