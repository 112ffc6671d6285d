"""Speed of `generate` on the devices at hand, beside the two bounds it cannot pass.

    python -m benchmarks.decode [--dtype=float32,bfloat16] [--batch=1,8] [--repeats=5]
                                [--exit=static:2 --kv=exited]

Shape: hidden 512, 8 layers, 8 heads, FFN 1408, vocabulary 8192, T = 4 (34.1 M parameters), KV
cache, prompt 64, 64 new tokens, greedy. Tokens/s are those from when every row has its first token;
the time to the first token of all, which is one prefill's, stands beside them. Every token reads
the layers' weights T times, the head's once, and the cache: read at the machine's memory speed,
that is the bound, with all loops. The speed of a sum over 256 MiB and of a matrix product are taken
before every answer, so that shares survive other work on the machine: all figures are medians over
the repeats.

Reference: the published PyTorch code (transformers 4.57.6, torch 2.13, 2 threads) at these shapes
on two such cores makes 18.8-19.6 tokens/s in float32 and 20-23 in bfloat16 at batch 1, 75-91 and
131 at batch 8. Goal in float32: 1.5 × at batch 1, that is 29 tokens/s, and on par at batch 8; with
two loops of four on average (kv `exited`) 2.7 × and 1.8 ×, that is 51 and 149 tokens/s.
"""

import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import random_params, seconds, shown
from ouro_jax.config import DTYPES, ModelConfig
from ouro_jax.inference.generate import generate
from ouro_jax.model.flops import forward_flops_per_token

PROMPT, NEW_TOKENS = 64, 64
MATMUL_SIZE = 1536
SUMMED_BYTES = 2**28

_DTYPE = flags.DEFINE_list("dtype", list(DTYPES), "Compute dtypes to measure.")
_BATCH = flags.DEFINE_list("batch", ["1", "8"], "Rows to answer at once.")
_EXIT = flags.DEFINE_string("exit", None, "Exit rule; all loops if unset.")
_KV = flags.DEFINE_string("kv", "full", "KV policy.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed answers, after one that is not.", 1)


def main(_) -> None:
    """Prints a table, and the same as one JSON line last."""
    rows = [
        measure(dtype, int(batch), _REPEATS.value)
        for dtype in _DTYPE.value
        for batch in _BATCH.value
    ]
    for name in rows[0]:
        print(f"{name:28s}" + "".join(f"{shown(row[name]):>14s}" for row in rows))
    print(json.dumps(rows))


def measure(dtype: str, batch: int, repeats: int) -> dict[str, Any]:
    """Rates of one compute dtype and batch: medians over `repeats`, and the fastest answer."""
    config = ModelConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8,
        num_kv_heads=8, head_dim=64, num_loops=4, dtype=dtype,
    )  # fmt: skip
    params = random_params(config)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (batch, PROMPT)).tolist()
    x = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), dtype)
    long = jnp.ones(SUMMED_BYTES // 4, jnp.float32)
    multiply, add = jax.jit(jnp.matmul), jax.jit(jnp.sum)

    tokens, first, matmul, memory = [], [], [], []
    for _ in range(repeats + 1):
        matmul.append(2 * MATMUL_SIZE**3 / min(seconds(multiply, x, x) for _ in range(4)))
        memory.append(SUMMED_BYTES / min(seconds(add, long) for _ in range(4)))
        start, stamps = time.perf_counter(), []
        generate(
            config, params, prompts, NEW_TOKENS, exit=_EXIT.value, kv=_KV.value,
            on_token=lambda row, *_, stamps=stamps: stamps.append((row, time.perf_counter())),
        )  # fmt: skip
        first.append(stamps[0][1] - start)
        # From when all rows have their first token, which they get one after the other.
        joined = max(
            next(i for i, stamp in enumerate(stamps) if stamp[0] == r) for r in range(batch)
        )
        tokens.append((len(stamps) - 1 - joined) / (stamps[-1][1] - stamps[joined][1]))
    # The first answer paid for the compilation.
    tokens, first, matmul, memory = tokens[1:], first[1:], matmul[1:], memory[1:]

    # A new token sees 64 … 127 others and itself: as many as the mean token of a row of 191.
    flops = forward_flops_per_token(config, 2 * PROMPT + NEW_TOKENS - 1, num_heads_read=1)
    bounds = [batch * speed / _bytes_per_step(config, params, batch) for speed in memory]
    median = statistics.median
    return {
        "dtype": dtype,
        "batch": batch,
        "tokens_per_second": median(tokens),
        "tokens_per_second_best": max(tokens),
        "first_token_ms": 1e3 * median(first),
        "gflops": median(tokens) * flops / 1e9,
        "matmul_gflops": median(matmul) / 1e9,
        "share_of_matmul": median(t * flops / m for t, m in zip(tokens, matmul, strict=True)),
        "memory_gb_per_second": median(memory) / 1e9,
        "bound_tokens_per_second": median(bounds),
        "share_of_bound": median(t / b for t, b in zip(tokens, bounds, strict=True)),
    }


def _bytes_per_step(config: ModelConfig, params: dict, batch: int) -> float:
    """What a decode step has to read: weights of the stack T times, the head, the cache so far."""
    itemsize = jnp.dtype(config.dtype).itemsize
    stack = sum(x.size for x in jax.tree.leaves(params["stack"]))
    head = config.vocab_size * config.hidden_size
    seen = PROMPT + NEW_TOKENS / 2
    cache = 2 * config.num_layers * batch * seen * config.num_kv_heads * config.head_dim
    return itemsize * (config.num_loops * (stack + cache) + head)


if __name__ == "__main__":
    app.run(main)
