"""What the benchmarks share: a timed call, a figure in print, a random model, rows of text."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from tokenizers import Tokenizer

from ouro_jax.config import ModelConfig
from ouro_jax.data import stdlib_text
from ouro_jax.data.tokenizer import encode
from ouro_jax.inference.slots import decoding_params
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
    """Fresh weights as the engine holds them."""
    init = jax.jit(LoopLM(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return jax.block_until_ready(decoding_params(config, meta.unbox(init)["params"]))


def library_rows(tokenizer: Tokenizer, split: str, count: int, length: int) -> np.ndarray:
    """Token ids [count, length] of Python's library, in turns of a module's code and its prose."""
    ids: list[int] = []
    for code, prose in zip(stdlib_text.code(split), stdlib_text.prose(split), strict=False):
        # The first characters: no long module is to be all there is.
        ids += [id for text in code + prose for id in encode(tokenizer, text[:3000])]
        if len(ids) >= count * length:
            return np.asarray(ids[: count * length], np.int32).reshape(count, length)
    raise SystemExit(f"the {split} text has only {len(ids)} tokens")
