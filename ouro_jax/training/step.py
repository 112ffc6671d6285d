"""The compiled optimizer step and the compiled evaluation.

A step scans over its microbatches, adds gradients, losses and token counts in float32, divides
once by the tokens of the whole batch, and updates once.

M microbatches, B rows of a microbatch, L sequence, T loops.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ouro_jax.config import ModelConfig, OptimizerConfig, parse_prior
from ouro_jax.data.batch import Batch
from ouro_jax.model.loop_lm import LoopLM, LoopOutput
from ouro_jax.objectives.cross_entropy import cross_entropy
from ouro_jax.objectives.losses import Sums, expected_loss, gate_loss, last_loop_loss
from ouro_jax.parallel.mesh import batch_shards, require_mesh
from ouro_jax.training.optimizer import make_optimizer, trained_part, with_trained_part
from ouro_jax.training.state import StateFactory, TrainState, replicated

# Rows of logits held at once on one device: 1024 × 49,152 float32 are 192 MiB.
CHUNK_TOKENS = 1024


class StepInputs(NamedTuple):
    """Numbers that change along the curriculum; traced, so that no value compiles anew."""

    learning_rate: Any
    weight_decay: Any
    entropy_weight: Any
    rope_theta: Any


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """All that a compiled step depends on, beside the shapes of its batch."""

    model: ModelConfig
    optimizer: OptimizerConfig
    objective: str
    prior: str
    remat: str
    gather: str
    mesh: Mesh


@functools.cache
def compiled_train_step(spec: StepSpec):
    """The jitted step (state, batch [M, B, L], inputs) → (state, metrics); the state is donated."""
    factory = StateFactory(spec.model, spec.optimizer, spec.objective, spec.mesh)
    return jax.jit(
        functools.partial(_train_step, spec),
        donate_argnums=0,
        out_shardings=(factory.shardings(), replicated(spec.mesh)),
    )


def _train_step(spec: StepSpec, state: TrainState, batch: Batch, inputs: StepInputs):
    require_mesh()
    trained = trained_part(state.params, spec.objective)

    def loss_of(part, microbatch):
        params = with_trained_part(state.params, part)
        sums = batch_sums(spec, params, microbatch, inputs)
        return sums.loss, sums

    def accumulate(totals, microbatch):
        gradients, sums = jax.grad(loss_of, has_aux=True)(trained, microbatch)
        return jax.tree.map(jnp.add, totals, (gradients, sums)), None

    first = jax.tree.map(lambda x_MBL: x_MBL[0], batch)
    shapes = jax.eval_shape(lambda: jax.grad(loss_of, has_aux=True)(trained, first))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (gradients, sums), _ = jax.lax.scan(accumulate, zeros, batch)
    count = jnp.maximum(sums.num_tokens, 1.0)
    gradients = jax.tree.map(lambda gradient: gradient / count, gradients)

    optimizer = make_optimizer(spec.optimizer, inputs.learning_rate, inputs.weight_decay)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    params = with_trained_part(state.params, optax.apply_updates(trained, updates))
    metrics = sums.means() | {
        "num_tokens": sums.num_tokens,
        "grad_norm": optax.tree.norm(gradients),
        "grad_norms": {name: optax.tree.norm(g) for name, g in _groups(gradients).items()},
    }
    return state.replace(params=params, opt_state=opt_state, step=state.step + 1), metrics


def batch_sums(spec: StepSpec, params: Any, batch: Batch, inputs: StepInputs) -> Sums:
    """The stage's objective over one microbatch [B, L], as sums."""
    model = LoopLM(spec.model, remat=spec.remat)
    out = cast(LoopOutput, model.apply(
        {"params": params}, batch.tokens_BL, batch.positions_BL, batch.segment_ids_BL,
        rope_theta=inputs.rope_theta,
    ))  # fmt: skip
    head_DV = params["lm_head"]["kernel"]
    chunk = CHUNK_TOKENS * batch_shards(spec.mesh)
    ce_TBL = cross_entropy(out.states_TBLD, head_DV, batch.targets_BL, chunk)
    terms = (ce_TBL, out.gate_logits_TBL, batch.loss_mask_BL)
    if spec.objective == "expected":
        return expected_loss(*terms, inputs.entropy_weight, parse_prior(spec.prior))
    if spec.objective == "last_loop":
        return last_loop_loss(*terms)
    return gate_loss(*terms, lookahead=spec.objective == "gate_lookahead")


@functools.cache
def compiled_evaluation(config: ModelConfig, mesh: Mesh, num_loops: int):
    """The jitted evaluation (params, batch [B, L], rope_theta) → sums.

    `loss_per_loop` covers loops 1 … `num_loops`, beyond training too; the exit distribution and
    the depth are those of the trained number of loops.
    """
    model = LoopLM(config, remat="none")
    trained_loops = config.num_loops
    chunk = CHUNK_TOKENS * batch_shards(mesh)

    def evaluate(params: Any, batch: Batch, rope_theta: jax.Array) -> Sums:
        require_mesh()
        out = cast(LoopOutput, model.apply(
            {"params": params}, batch.tokens_BL, batch.positions_BL, batch.segment_ids_BL,
            num_loops=max(num_loops, trained_loops), rope_theta=rope_theta,
        ))  # fmt: skip
        head_DV = params["lm_head"]["kernel"]
        ce_TBL = cross_entropy(out.states_TBLD, head_DV, batch.targets_BL, chunk)
        gates_TBL = out.gate_logits_TBL[:trained_loops]
        sums = expected_loss(ce_TBL[:trained_loops], gates_TBL, batch.loss_mask_BL, 0.0)
        per_loop_T = jnp.sum(jnp.where(batch.loss_mask_BL, ce_TBL, 0.0), axis=(-2, -1))
        return sums.replace(metrics=sums.metrics | {"loss_per_loop": per_loop_T})

    return jax.jit(evaluate, out_shardings=replicated(mesh))


def _groups(gradients: Any) -> dict[str, Any]:
    """Gradients by kind of parameter: embedding, attention, mlp, norms, gate, head."""
    kinds = {
        "embed_tokens": "embedding", "self_attn": "attention", "mlp": "mlp",
        "early_exit_gate": "gate", "lm_head": "head", "scale": "norms",
    }  # fmt: skip
    groups: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        kind = next(kinds[entry.key] for entry in path if entry.key in kinds)
        groups.setdefault(kind, []).append(leaf)
    return groups
