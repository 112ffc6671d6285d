"""Ten training steps on one mesh after another, and the process that takes them among others.

python tests/train_hosts.py '{"hosts": 2, "host": 1, "address": "127.0.0.1:4000", …}'
"""

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from ouro_jax.config import Config, MeshConfig, from_config_dict
from ouro_jax.parallel.host_rows import data_host, place
from ouro_jax.parallel.hosts import joined
from ouro_jax.parallel.mesh import batch_sharding, make_mesh, use_mesh
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.stage_rows import open_stage_mixture
from ouro_jax.training.state import StateFactory
from ouro_jax.training.step import StepInputs, StepSpec, compiled_train_step


def ten_steps(config: Config, name: str, mesh: Mesh, gather: str) -> dict[str, Any]:
    """`losses` of ten steps of a stage, each of two microbatches, and the parameters by name."""
    stage, model = config.stages[name], config.stage_model(name)
    spec = StepSpec(model, config.optimizer, "expected", "uniform", "layer", gather, mesh)
    state = StateFactory(model, config.optimizer, "expected", mesh).init(0)
    inputs = StepInputs(*map(np.float32, (1e-3, 0.1, 0.05, 1e4)))
    plan, host, losses = StagePlan(name, stage), data_host(mesh), []
    mixture = open_stage_mixture(config, Path(config.data.root), plan)
    batches = mixture.batches(0, plan.batch_rows, host=host.index, num_hosts=host.count)
    with use_mesh(mesh), contextlib.closing(batches):
        for _, batch in itertools.islice(batches, 10):
            batch = jax.tree.map(lambda x_BL: x_BL.reshape(2, -1, x_BL.shape[-1]), batch)
            batch = place(batch, batch_sharding(mesh, microbatched=True))
            state, metrics = compiled_train_step(spec)(state, batch, inputs)
            losses.append(jax.device_get(metrics["loss"]))
    params: Any = process_allgather(state.params, tiled=True)
    named: Any = flatten_dict(params, sep="/")
    return {"losses": np.array(losses), **named}


def main() -> None:
    """Joins the other processes; the first one writes what each run of the task gave."""
    task = json.loads(sys.argv[1])
    config = from_config_dict(json.loads(Path(task["config"]).read_text()))
    with joined(task["address"], task["hosts"], task["host"]):
        for number, (stage, sizes, gather) in enumerate(task["runs"]):
            result = ten_steps(config, stage, make_mesh(MeshConfig(*sizes)), gather)
            if task["host"] == 0:
                np.savez(f"{task['output']}/{number}.npz", **result)


if __name__ == "__main__":
    main()
