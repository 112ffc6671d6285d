"""Speed and memory of the optimizer step that `ouro train` runs, on the devices at hand.

    python -m benchmarks.train_step [--dtype=float32,bfloat16] [--remat=layer] [--steps=5]

Shape: hidden 512, 8 layers, 8 heads, FFN 1408, vocabulary 8192, T = 4 (34.1 M parameters), batch
4 × 256, equation 4's loss, forward, backward, clipping and AdamW. A matrix product is timed before
every step, so that the share of the machine's peak survives other work on the machine: the median
of the step's rate over the product's, in the compute dtype. FLOPs are the model's
(`ouro_jax.model.flops`): what remat computes again is not counted.

Reference: the published PyTorch code (transformers 4.57.6, torch 2.13, 2 threads, no remat) at
these shapes on two cores whose float32 product makes 179 to 197 GFLOP/s: 185 tokens/s in float32
(142 GFLOP/s), 359 in pure bfloat16, 322 under autocast. Goal: 0.75 × in float32 with remat, that
is 139 tokens/s on such cores when they are quiet, with temporaries under 600 MiB.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import seconds, shown
from ouro_jax.config import DTYPES, REMAT_POLICIES, MeshConfig, ModelConfig, OptimizerConfig
from ouro_jax.data.batch import Batch
from ouro_jax.model.flops import train_flops_per_token
from ouro_jax.parallel.mesh import make_mesh, use_mesh
from ouro_jax.training.state import StateFactory
from ouro_jax.training.step import StepInputs, StepSpec, compiled_train_step

BATCH, LENGTH = 4, 256
MATMUL_SIZE = 1536

_DTYPE = flags.DEFINE_list("dtype", list(DTYPES), "Compute dtypes to measure.")
_REMAT = flags.DEFINE_enum("remat", "layer", REMAT_POLICIES[1:], "What the backward recomputes.")
_STEPS = flags.DEFINE_integer("steps", 5, "Timed steps per dtype, after one that is not.", 1)


def main(_) -> None:
    """Prints a table, and the same as one JSON line last."""
    rows = [measure(dtype, _REMAT.value, _STEPS.value) for dtype in _DTYPE.value]
    for name in rows[0]:
        print(f"{name:24s}" + "".join(f"{shown(row[name]):>14s}" for row in rows))
    print(json.dumps(rows))


def measure(dtype: str, remat: str, steps: int) -> dict[str, str | float]:
    """Rates of one compute dtype: medians over `steps`, and the fastest step."""
    model = ModelConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8,
        num_kv_heads=8, head_dim=64, num_loops=4, dtype=dtype,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = OptimizerConfig()
    state = StateFactory(model, optimizer, "expected", mesh).init(seed=0)
    batch, inputs = _batch(model.vocab_size), StepInputs(3e-4, 0.1, 0.05, model.rope_theta)
    spec = StepSpec(model, optimizer, "expected", "uniform", remat, "each_loop", mesh)
    with use_mesh(mesh):
        start = time.perf_counter()
        compiled = compiled_train_step(spec).lower(state, batch, inputs).compile()
        compile_seconds = time.perf_counter() - start

        x = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), dtype)
        product = jax.jit(jnp.matmul).lower(x, x).compile()
        matmul_flops, step_seconds = [], []
        for _ in range(steps + 1):
            matmul_flops.append(2 * MATMUL_SIZE**3 / min(seconds(product, x, x) for _ in range(5)))
            start = time.perf_counter()
            state, metrics = compiled(state, batch, inputs)
            jax.block_until_ready((state, metrics))
            step_seconds.append(time.perf_counter() - start)
    matmul_flops, step_seconds = matmul_flops[1:], step_seconds[1:]

    flops = BATCH * LENGTH * train_flops_per_token(model, LENGTH)
    shares = [flops / s / peak for s, peak in zip(step_seconds, matmul_flops, strict=True)]
    memory = compiled.memory_analysis()
    assert memory is not None  # CPU, TPU and GPU all report it.
    return {
        "dtype": dtype,
        "remat": remat,
        "tokens_per_second": BATCH * LENGTH / statistics.median(step_seconds),
        "tokens_per_second_best": BATCH * LENGTH / min(step_seconds),
        "gflops": flops / statistics.median(step_seconds) / 1e9,
        "matmul_gflops": statistics.median(matmul_flops) / 1e9,
        "share_of_matmul": statistics.median(shares),
        "share_of_matmul_best": max(shares),
        "temporaries_mib": memory.temp_size_in_bytes / 2**20,
        "compile_seconds": compile_seconds,
        "loss": float(metrics["loss"]),
    }


def _batch(vocab_size: int) -> Batch:
    """One microbatch of random tokens: [1, B, L], every token counted, one document a row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (1, BATCH, LENGTH + 1), np.int32)
    ones = np.ones((1, BATCH, LENGTH), np.int32)
    positions = ones * np.arange(LENGTH, dtype=np.int32)
    return Batch(tokens[..., :-1], tokens[..., 1:], ones, positions, ones.astype(bool))


if __name__ == "__main__":
    app.run(main)
