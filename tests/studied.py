"""A tiny random model and held-out rows for the studies, and numpy's own view of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from ouro_jax.config import ModelConfig
from ouro_jax.data.batch import batch_from_rows
from ouro_jax.data.mixture import HeldoutBatch
from ouro_jax.data.rows import Row
from ouro_jax.experiments.scores import Heldout
from ouro_jax.experiments.study import Subject
from ouro_jax.model.loop_lm import LoopLM

VOCAB, LENGTH = 61, 24


@functools.cache
def subject(layers: int = 2) -> Subject:
    """A few layers of random weights, whose gates differ from token to token."""
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=layers, num_heads=2,
        num_kv_heads=1, head_dim=16, num_loops=4, embedding_initializer_range=1.0,
        initializer_range=0.2, max_position_embeddings=256, dtype="float32",
    )  # fmt: skip
    init = jax.jit(LoopLM(config).init)
    params = init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = meta.unbox(params)
    gate = params["stack"]["early_exit_gate"]
    gate["kernel"] = jax.random.normal(jax.random.key(1), gate["kernel"].shape) / 3
    return Subject("random", config, params)


def batches(seed: int) -> list[HeldoutBatch]:
    """Two batches of two rows of two documents and some padding, 100 bytes each."""
    rng = np.random.default_rng(seed)

    def row():
        tokens = rng.integers(0, VOCAB, LENGTH).astype(np.int32)
        return Row(tokens, np.array([9, 12], np.int32))

    return [HeldoutBatch(batch_from_rows([row(), row()]), 100) for _ in range(2)]


def heldout() -> Heldout:
    """Two sources, a and b."""
    return Heldout("random rows", LENGTH, {
        "a": functools.partial(batches, 0), "b": functools.partial(batches, 1),
    })  # fmt: skip


@functools.cache
def whole_logits(loops: int, seed: int, index: int) -> tuple[np.ndarray, ...]:
    """(logits [T, N, V], gate logits [T, N], states [T, N, D], targets [N]) of scored tokens.

    Of batch `index` of `batches(seed)`, by the subject, in float64 but for the forward pass.
    """
    data = batches(seed)[index].batch
    states_TBLD, gates_TBL, logits_TBLV = _forward(loops, subject().params, data)
    counted_BL = data.loss_mask_BL
    return (
        *(np.asarray(x, np.float64)[:, counted_BL] for x in (logits_TBLV, gates_TBL, states_TBLD)),
        data.targets_BL[counted_BL],
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(loops, params, data):
    model, params = LoopLM(subject().config), {"params": params}
    out = model.apply(
        params, data.tokens_BL, data.positions_BL, data.segment_ids_BL, num_loops=loops
    )
    logits_TBLV = model.apply(params, out.states_TBLD, method="logits")
    return out.states_TBLD, out.gate_logits_TBL, logits_TBLV


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
