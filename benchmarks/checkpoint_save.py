"""How long training stands still for a checkpoint, and what that makes of the 1.4B state on a pod.

    python -m benchmarks.checkpoint_save [--megabytes=64,128,256,512]

States of several sizes are checked (finite, bits summed) and saved as in training; the stall is the
time until the next step may begin, `whole` the time until the files and their checksums are on
disk, beside the same written by one plain `write` and hashed. A line is fitted to the stalls. The
1.4B state has 12 bytes a parameter; a host of a v5e-256 holds a 64th of it, one of a v5p-128 a
32nd. Their stalls at one checkpoint in 15 minutes (the default policy) are set against 5 %.
"""

import hashlib
import json
import os
import runpy
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks.measure import shown
from ouro_jax.config import MeshConfig, ModelConfig, OptimizerConfig, from_config_dict
from ouro_jax.config import num_parameters as count
from ouro_jax.parallel.mesh import make_mesh
from ouro_jax.settings import CheckpointConfig
from ouro_jax.training.checkpoints import Position, StageCheckpoints
from ouro_jax.training.state import StateFactory, TrainState
from ouro_jax.training.state_checks import disagreeing, not_finite, state_sums

BYTES_PER_PARAMETER = 12  # float32 weights and two moments
HOSTS = {"v5e-256": 64, "v5p-128": 32, "one host": 1}
ROUNDS = 3

_SIZES = flags.DEFINE_list("megabytes", ["64", "128", "256", "512"], "Sizes of the states.")


def main(_: Sequence[str]) -> None:
    """Prints a table and the extrapolation, and both as one JSON line last."""
    logging.set_verbosity(logging.ERROR)
    rows = [measure(int(size)) for size in _SIZES.value]
    print(" ".join(f"{name:>12s}" for name in rows[0]))
    for row in rows:
        print(" ".join(f"{shown(value):>12s}" for value in row.values()))
    slope, offset = np.polyfit([r["gigabytes"] for r in rows], [r["stall"] for r in rows], 1)
    path = Path(__file__).parent.parent / "configs" / "ouro_1p4b.py"
    config = from_config_dict(runpy.run_path(str(path))["get_config"]())
    whole = count(config.stage_model("anneal")) * BYTES_PER_PARAMETER / 1e9
    every = 60 * CheckpointConfig().every_minutes
    shares = {}
    for name, hosts in HOSTS.items():
        first, each = max(offset, 0.0), whole / hosts
        stall = first + slope * each
        shares[name] = 100 * stall / every
        print(
            f"{name}: {whole:.1f} GB / {hosts} hosts = {each:.2f} GB; {first:.2f} s + {slope:.2f} "
            f"s/GB × {each:.2f} GB = {stall:.2f} s in {every:.0f} s: {shares[name]:.2f} %"
        )
    print(json.dumps({"rows": rows, "seconds_per_gigabyte": slope, "percent": shares}))


def measure(megabytes: int) -> dict[str, float]:
    """Medians in seconds for a state of about so many megabytes."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    # Embedding and head hold nearly all of it.
    vocabulary = max(256, int(megabytes * 1e6 / BYTES_PER_PARAMETER / 1024) // 2)
    model = ModelConfig(vocabulary, 512, 1408, 1, 8, 8, 64, dtype="float32")
    factory = StateFactory(model, OptimizerConfig(), "expected", mesh)

    def filled(leaf: jax.Array) -> jax.Array:  # Adam's zeros would be compressed to nothing
        return jax.random.normal(jax.random.key(leaf.size), leaf.shape) if leaf.ndim else leaf

    state = factory.init(0)
    fill = jax.jit(
        lambda tree: jax.tree.map(filled, tree), out_shardings=factory.shardings().opt_state
    )
    state = state.replace(opt_state=fill(state.opt_state))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with tempfile.TemporaryDirectory() as folder:
        taken = [save(state, model, mesh, Path(folder), number) for number in range(ROUNDS + 1)]
        check, stall, until_whole = map(statistics.median, zip(*taken[1:], strict=True))
        return {
            "gigabytes": size / 1e9, "check": check, "stall": stall, "whole": until_whole,
            "plain write": plain_write(size, Path(folder) / "plain"),
        }  # fmt: skip


def save(
    state: TrainState, model: ModelConfig, mesh: jax.sharding.Mesh, folder: Path, number: int
) -> tuple[float, float, float]:
    """Seconds of the check, of the stall with it, and until the checkpoint is whole."""
    position = Position("stable_1a", number, 0, 0, model, "expected", 0)
    with StageCheckpoints(folder / "stable_1a") as checkpoints:
        began = time.perf_counter()
        sums = state_sums(state, mesh)
        assert not disagreeing(state, sums, mesh) and not not_finite(state, sums)
        checked = time.perf_counter() - began
        checkpoints.save(state, position, {}, permanent=False)
        stalled = time.perf_counter() - began
        checkpoints.wait()
        return checked, stalled, time.perf_counter() - began


def plain_write(size: int, path: Path) -> float:
    """Seconds to write so many bytes to the same disk, and to hash them."""
    content = np.random.default_rng(0).bytes(size)
    began = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    hashlib.sha256(content).hexdigest()
    return time.perf_counter() - began


if __name__ == "__main__":
    app.run(main)
