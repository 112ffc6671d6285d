"""How much of the arithmetic that early exit saves is saved time, in one request and in a batch.

    python -m benchmarks.depth [--batch=1,8,32] [--tokens=48] [--repeats=5] [--plot=depth.png]

Shape: hidden 512, 8 layers, 8 heads, FFN 1408, vocabulary 8192, T = 4, float32, KV policy `exited`,
prompt 64. All slots of the engine are taken throughout; time and depths are those of `--tokens`
tokens a slot after every prompt has been read. What a token costs in arithmetic is d loops, its
attention and one head (`model/flops.py`), d being the mean depth that was seen; the share realised
is the time saved against four loops, divided by the FLOPs saved. The depths are forced, so that a
gate's quality plays no part: `static:1` … `static:4`, batches of half `static:1` and half
`static:3`, and Q-exit on a random gate. Rules take turns, all figures are medians over the repeats.
"""

import json
import statistics
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from benchmarks.measure import random_params, shown
from ouro_jax.config import ModelConfig
from ouro_jax.experiments.exit_times import timed_turn
from ouro_jax.inference.engine import Engine
from ouro_jax.model.flops import attention_flops, head_flops, projection_flops

PROMPT = 64
CONFIG = ModelConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8,
    num_kv_heads=8, head_dim=64, num_loops=4, dtype="float32",
)  # fmt: skip
ALL_LOOPS = "static:4"
RULES = {
    "static:1": ["static:1"], "static:2": ["static:2"], "static:3": ["static:3"],
    ALL_LOOPS: [ALL_LOOPS], "half 1, half 3": ["static:1", "static:3"],
    "q:0.5": ["q:0.5"], "q:0.8": ["q:0.8"], "lookahead:0.7": ["lookahead:0.7"],
}  # fmt: skip

_BATCH = flags.DEFINE_list("batch", ["1", "8", "32"], "Slots of the engine, all taken.")
_TOKENS = flags.DEFINE_integer("tokens", 48, "Tokens of each slot that are timed.", 8)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed turns of every rule, after one that is not.")
_PLOT = flags.DEFINE_string("plot", "", "Where to draw time against mean depth, a PNG.")


def main(_) -> None:
    """Prints a table, and the same as one JSON line last."""
    params = random_params(CONFIG)
    # Gates that differ from token to token: some leave at once, some run all loops.
    gate = params["stack"]["early_exit_gate"]
    scale = 1.5 / np.sqrt(CONFIG.hidden_size)
    gate["kernel"] = jax.random.normal(jax.random.key(1), gate["kernel"].shape) * scale
    rows = [
        row
        for batch in map(int, _BATCH.value)
        for row in measure(params, batch, _TOKENS.value, _REPEATS.value)
    ]
    for name in rows[0]:
        print(f"{name:26s}" + "".join(f"{shown(row[name]):>16s}" for row in rows))
    if _PLOT.value:
        draw(rows, _PLOT.value)
    print(json.dumps(rows))


def measure(params: dict, batch: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A row for every rule."""
    engine = Engine(CONFIG, params, kv="exited", slots=batch, window=PROMPT + 3 * tokens)
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in RULES}
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, CONFIG.vocab_size, (batch, PROMPT)).tolist()
    for _ in range(repeats + 1):
        for name, rules in RULES.items():
            timed[name].append(timed_turn(engine, prompts, rules, tokens))
    timed = {name: turns[1:] for name, turns in timed.items()}
    median = statistics.median
    return [
        {
            "batch": batch,
            "rule": name,
            "mean_depth": median(depth for _, depth in turns),
            "ms_per_token": 1e3 * median(seconds for seconds, _ in turns),
            "tokens_per_second": 1 / median(seconds for seconds, _ in turns),
            "speed_up": median(
                base / seconds
                for (seconds, _), (base, _) in zip(turns, timed[ALL_LOOPS], strict=True)
            ),
            "flop_bound": flops(4.0, tokens) / flops(median(d for _, d in turns), tokens),
            "realised": median(
                (1 - seconds / base) / (1 - flops(depth, tokens) / flops(4.0, tokens))
                for (seconds, depth), (base, _) in zip(turns, timed[ALL_LOOPS], strict=True)
            )
            if name != ALL_LOOPS
            else float("nan"),
        }
        for name, turns in timed.items()
    ]


def flops(depth: float, tokens: int) -> float:
    """FLOPs of a token of that depth, in the middle of what is timed."""
    # The formula halves a row's positions: this token attends to all before it.
    attention = attention_flops(CONFIG, 2 * (PROMPT + tokens // 2))
    layers = CONFIG.num_layers * (projection_flops(CONFIG) + attention)
    return depth * layers + head_flops(CONFIG)


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Time of a token against its mean depth, each relative to all loops, beside the FLOPs."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    depths = np.linspace(1, 4, 2)
    relative = [flops(depth, 48) / flops(4.0, 48) for depth in depths]
    axes.plot(depths, relative, color="0.5", linewidth=1, label="FLOPs")
    for marker, batch in zip("osD^v", sorted({row["batch"] for row in rows}), strict=False):
        mine = [row for row in rows if row["batch"] == batch]
        axes.plot(
            [row["mean_depth"] for row in mine], [1 / row["speed_up"] for row in mine], marker,
            linestyle="", label=f"time, batch {batch}", alpha=0.8,
        )  # fmt: skip
    axes.set(xlabel="mean depth of the tokens", ylabel="relative to four loops", ylim=(0, 1.1))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    app.run(main)
