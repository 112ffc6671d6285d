"""What the benchmarks share: timing one call, printing a figure, a model of random weights."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.core import meta

from ouro_jax.config import ModelConfig
from ouro_jax.inference.slots import cast_params
from ouro_jax.model.loop_lm import LoopLM


def seconds(function: Callable, *args) -> float:
    """Wall time of one call, its arrays computed."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def shown(value: str | float) -> str:
    """A figure in a few characters."""
    return value if isinstance(value, str) else f"{value:,.3g}" if value < 10 else f"{value:,.1f}"


def random_params(config: ModelConfig) -> dict:
    """Fresh weights in the compute dtype."""
    init = jax.jit(LoopLM(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return jax.block_until_ready(cast_params(config, meta.unbox(init)["params"]))
