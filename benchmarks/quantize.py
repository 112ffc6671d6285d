"""What int8 weights cost and save: the error of every loop, bytes, decoding speed.

    python -m benchmarks.quantize --checkpoint=runs/tiny [--loops=8] [--repeats=5]

Errors are those of a trained checkpoint on held-out text (code and prose of Python's library),
plain and calibrated on text of the training split: the relative error of the states, KL in
millionths of a nat and the share of positions with the same most probable token, loop by loop, so
also for loops that the model was not trained with. Bytes are counted from the shapes of the
released models. Speed is that of decode steps at the shapes of `benchmarks.decode`, batch 1, taken
in turns so that other work on the machine meets all alike; medians.
"""

import dataclasses
import json
import runpy
import statistics
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax.core import meta

from benchmarks.measure import library_rows
from ouro_jax.cli.open_checkpoint import open_checkpoint
from ouro_jax.config import ModelConfig
from ouro_jax.data.tokenizer import load_tokenizer
from ouro_jax.inference.generate import generate
from ouro_jax.inference.quantize import quantize
from ouro_jax.inference.slots import cast_params, decoding_params
from ouro_jax.model.loop_lm import LoopLM

ROW, CALIBRATION_ROWS, HELDOUT_ROWS = 128, 64, 32
PROMPT, NEW_TOKENS = 64, 32

_CHECKPOINT = flags.DEFINE_string("checkpoint", "runs/tiny", "A trained model and its tokenizer.")
_LOOPS = flags.DEFINE_integer("loops", 8, "Loops to look at.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed answers of each, after one that is not.", 1)


def main(_) -> None:
    """Prints three tables, and the same as one JSON line last."""
    errors = measure_errors(_CHECKPOINT.value, _LOOPS.value)
    for name, row in errors.items():
        print(f"{name:28s}" + "".join(f"{value:10.4g}" for value in row))
    memory = {"1.4B": weight_bytes(24), "2.6B": weight_bytes(48)}
    for name, row in memory.items():
        print(f"{name:8s}" + "".join(f"{key:>12s} {size:,}" for key, size in row.items()))
    speed = measure_speed(_REPEATS.value)
    for name, value in speed.items():
        print(f"{name:28s}{value:10.1f} tokens/s")
    print(json.dumps({"errors": errors, "bytes": memory, "tokens_per_second": speed}))


def measure_errors(path: str, loops: int) -> dict[str, list[float]]:
    """Three errors of plain and of calibrated int8, each a list over loops, on held-out text."""
    checkpoint = open_checkpoint(path)
    config, params = checkpoint.config, checkpoint.params
    tokenizer = load_tokenizer(str(checkpoint.tokenizer_file))
    heldout_BL = library_rows(tokenizer, "heldout", HELDOUT_ROWS, ROW)

    @jax.jit
    def run(params):
        model = LoopLM(config)
        out = cast(Any, model.apply({"params": params}, heldout_BL, num_loops=loops))
        logits = model.apply({"params": params}, out.states_TBLD, method="logits")
        return out.states_TBLD, jax.nn.log_softmax(cast(jax.Array, logits))

    states_TBLD, logp_TBLV = run(params)
    calibration_BL = library_rows(tokenizer, "train", CALIBRATION_ROWS, ROW)
    found = {}
    for name, tree in (
        ("plain", quantize(config, params)),
        ("calibrated", quantize(config, params, calibration_BL)),
    ):
        theirs_TBLD, theirs_TBLV = run(tree)
        wrong = jnp.sum((theirs_TBLD - states_TBLD) ** 2, (1, 2, 3))
        relative = jnp.sqrt(wrong / jnp.sum(states_TBLD**2, (1, 2, 3)))
        kl = jnp.sum(jnp.exp(logp_TBLV) * (logp_TBLV - theirs_TBLV), -1).mean((1, 2))
        same = jnp.mean(logp_TBLV.argmax(-1) == theirs_TBLV.argmax(-1), (1, 2))
        found[f"{name}: state error"] = relative.tolist()
        found[f"{name}: KL, 1e-6 nats"] = (1e6 * kl).tolist()
        found[f"{name}: same token"] = same.tolist()
    return found


def weight_bytes(num_layers: int) -> dict[str, int]:
    """Bytes of a released model's weights as float32, as bfloat16, and as int8 over bfloat16."""
    config = runpy.run_path("configs/ouro_1p4b.py")["get_model"](num_layers)
    floats = jax.eval_shape(lambda: _random(config))
    bfloats = jax.eval_shape(lambda tree: cast_params(config, tree), floats)
    trees = {
        "float32": floats,
        "bfloat16": bfloats,
        "int8": jax.eval_shape(lambda tree: quantize(config, tree), bfloats),
    }
    return {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for name, tree in trees.items()
    }


def measure_speed(repeats: int) -> dict[str, float]:
    """Tokens/s of decode steps with float and int8 weights in both compute dtypes."""
    config = ModelConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8,
        num_kv_heads=8, head_dim=64, num_loops=4, dtype="float32",
    )  # fmt: skip
    floats = jax.jit(lambda: _random(config))()
    contenders = {}
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(config, dtype=dtype)
        contenders[dtype] = model, decoding_params(model, floats)
        contenders[f"int8, computing {dtype}"] = (
            model,
            decoding_params(model, quantize(model, floats)),
        )
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, (1, PROMPT)).tolist()
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, (model, params) in contenders.items():
            stamps: list[float] = []
            generate(
                model, params, prompt, NEW_TOKENS,
                on_token=lambda *_, stamps=stamps: stamps.append(time.perf_counter()),
            )  # fmt: skip
            rates[name].append((NEW_TOKENS - 1) / (stamps[-1] - stamps[0]))
    # The first answer paid for the compilation.
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def _random(config: ModelConfig) -> Any:
    init = LoopLM(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return meta.unbox(init)["params"]


if __name__ == "__main__":
    app.run(main)
