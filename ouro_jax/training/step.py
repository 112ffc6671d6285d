"""The compiled optimizer step and the compiled evaluation.

A step scans over its microbatches, adds gradients, losses and token counts in float32, divides
once by the tokens of the whole batch, and updates once. `gather` says how often weights travel.

M microbatches, B rows of a microbatch, L sequence, T loops.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from ouro_jax.config import ModelConfig, OptimizerConfig, parse_prior
from ouro_jax.data.batch import Batch
from ouro_jax.model.loop_lm import LoopLM, LoopOutput
from ouro_jax.objectives.cross_entropy import cross_entropy
from ouro_jax.objectives.losses import Sums, expected_loss, gate_loss, last_loop_loss
from ouro_jax.parallel.attention import attention_for
from ouro_jax.parallel.mesh import (
    BATCH_AXES,
    MANUAL_AXES,
    fsdp_spec,
    is_manual,
    per_device,
    require_mesh,
)
from ouro_jax.training.guard import judge
from ouro_jax.training.optimizer import make_optimizer, trained_part, with_trained_part
from ouro_jax.training.state import StateFactory, TrainState, replicated

# Rows of logits held at once on one device: 1024 × 49,152 float32 are 192 MiB.
CHUNK_TOKENS = 1024


class StepInputs(NamedTuple):
    """Numbers that change along the curriculum; traced, so that no value compiles anew.

    The step is taken from a state of `step` steps only, and by default from any. `spike_deviations`
    is what a loss or gradient norm may lie above the median, see `guard.py`. `requests` [devices]
    is what each process asks of all: a step gives everyone the highest, at the same step.
    """

    learning_rate: Any
    weight_decay: Any
    entropy_weight: Any
    rope_theta: Any
    spike_deviations: Any = math.inf
    step: Any = None
    requests: Any = None


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


def requests_sharding(mesh: Mesh) -> NamedSharding:
    """How `StepInputs.requests` lies: one entry on each device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def abstract_inputs(mesh: Mesh) -> StepInputs:
    """Shapes of the inputs of a step, for compiling it ahead of time."""
    whole = replicated(mesh)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    requests = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=requests_sharding(mesh))
    return StepInputs(number, number, number, number, number, step, requests)


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
    summed = _summed_once if spec.gather == "once" else _summed
    gradients, sums = summed(spec, state.params, batch, inputs)
    count = jnp.maximum(sums.num_tokens, 1.0)
    gradients = jax.tree.map(lambda gradient: gradient / count, gradients)

    means, grad_norm = sums.means(), optax.tree.norm(gradients)
    verdict, guard = judge(state.guard, means["loss"], grad_norm, inputs.spike_deviations)
    accepted = verdict.accepted
    if inputs.step is not None:
        accepted &= state.step == inputs.step
    after = _updated(spec, state.replace(guard=guard), gradients, inputs)
    state = jax.tree.map(functools.partial(jnp.where, accepted), after, state)
    metrics = (
        means
        | verdict._asdict()
        | {
            "accepted": accepted,
            "num_tokens": sums.num_tokens,
            "grad_norm": grad_norm,
            "grad_norms": {name: optax.tree.norm(g) for name, g in _groups(gradients).items()},
        }
    )
    if inputs.requests is not None:
        metrics["request"] = jnp.max(inputs.requests)
    return state, metrics


def _updated(spec: StepSpec, state: TrainState, gradients: Any, inputs: StepInputs) -> TrainState:
    trained = trained_part(state.params, spec.objective)
    optimizer = make_optimizer(spec.optimizer, inputs.learning_rate, inputs.weight_decay)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    params = with_trained_part(state.params, optax.apply_updates(trained, updates))
    return state.replace(params=params, opt_state=opt_state, step=state.step + 1)


def _summed(spec: StepSpec, params: Any, batch: Batch, inputs: StepInputs) -> tuple[Any, Sums]:
    """Float32 gradients of the trained part, and sums, over all microbatches."""
    trained = trained_part(params, spec.objective)

    def loss_of(part, microbatch):
        sums = batch_sums(spec, with_trained_part(params, part), microbatch, inputs)
        return sums.loss, sums

    def accumulate(totals, microbatch):
        terms = jax.grad(loss_of, has_aux=True)(trained, microbatch)
        return jax.tree.map(
            lambda total, term: total + term.astype(total.dtype), totals, terms
        ), None

    first = jax.tree.map(lambda x_MBL: x_MBL[0], batch)
    shapes = jax.eval_shape(lambda: jax.grad(loss_of, has_aux=True)(trained, first))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    return jax.lax.scan(accumulate, zeros, batch)[0]


def _summed_once(spec: StepSpec, params: Any, batch: Batch, inputs: StepInputs):
    """`_summed` with one gather of the weights before and one reduction of the gradients after.

    Left to the compiler, a loop gathers a layer's weights when it reads them and reduces its
    gradient when it has it: T times each, for every microbatch. So each device works on its own
    rows by hand, with a whole copy of the weights in the compute dtype.
    """
    factory = StateFactory(spec.model, spec.optimizer, spec.objective, spec.mesh)
    specs = jax.tree.map(fsdp_spec, factory.shardings().params)

    def own_rows(params, batch, inputs):
        whole = jax.tree.map(functools.partial(_gather, spec.model.dtype), params, specs)
        # Without a barrier the compiler may sink the gathers back into the loops.
        whole = jax.lax.optimization_barrier(whole)
        gradients, sums = _summed(spec, whole, batch, inputs)
        gradients = jax.tree.map(_reduce, gradients, trained_part(specs, spec.objective))
        return gradients, jax.lax.psum(sums, MANUAL_AXES)

    rows = PartitionSpec(None, BATCH_AXES, "context")
    out_specs = (trained_part(specs, spec.objective), PartitionSpec())
    run = per_device(own_rows, (specs, rows, PartitionSpec()), out_specs)
    return run(params, batch, inputs)


def _gather(dtype: DTypeLike, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The whole of a parameter, in the compute dtype if `fsdp` splits it; others are small."""
    if "fsdp" not in spec:
        return leaf
    return jax.lax.all_gather(leaf.astype(dtype), "fsdp", axis=spec.index("fsdp"), tiled=True)


def _reduce(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum over all devices of a gradient, each keeping its own part along `fsdp`."""
    if "fsdp" not in spec:
        return jax.lax.psum(gradient, MANUAL_AXES)
    axis = spec.index("fsdp")
    # With one axis after it: of [N, D, H, K] XLA for TPU makes an all-reduce, twice the traffic.
    flat = gradient.reshape(*gradient.shape[: axis + 1], -1)
    own = jax.lax.psum_scatter(flat, "fsdp", scatter_dimension=axis, tiled=True)
    own = own.reshape(*own.shape[: axis + 1], *gradient.shape[axis + 1 :])
    # Two sums and not one: v5e has no route for groups of `data` and `context` with `tensor`
    # between them (data 4, fsdp 16, tensor 2, context 2: an internal error of its compiler).
    return jax.lax.psum(jax.lax.psum(own, "context"), ("slice", "data"))


def batch_sums(spec: StepSpec, params: Any, batch: Batch, inputs: StepInputs) -> Sums:
    """The stage's objective over one microbatch [B, L], as sums."""
    attention = attention_for(spec.model, _row_length(spec.mesh, batch), spec.mesh)
    model = LoopLM(spec.model, attention, spec.remat)
    out = cast(LoopOutput, model.apply(
        {"params": params}, batch.tokens_BL, batch.positions_BL, batch.segment_ids_BL,
        rope_theta=inputs.rope_theta,
    ))  # fmt: skip
    ce_TBL = _token_losses(out.states_TBLD, params, batch)
    terms = (ce_TBL, out.gate_logits_TBL, batch.loss_mask_BL)
    if spec.objective == "expected":
        return expected_loss(*terms, inputs.entropy_weight, parse_prior(spec.prior))
    if spec.objective == "last_loop":
        return last_loop_loss(*terms)
    return gate_loss(*terms, lookahead=spec.objective == "gate_lookahead")


def _row_length(mesh: Mesh, batch: Batch) -> int:
    """Tokens of a whole row, of which a device by itself sees only its part along `context`."""
    return batch.tokens_BL.shape[-1] * (mesh.shape["context"] if is_manual() else 1)


def _token_losses(states_TBLD: jax.Array, params: Any, batch: Batch) -> jax.Array:
    """Cross-entropy [T, B, L], each device on its own rows with the whole head.

    A scan over chunks left to the compiler gathers the head and reduces its gradient per chunk.
    """
    head_DV = params["lm_head"]["kernel"]
    if is_manual():
        return cross_entropy(states_TBLD, head_DV, batch.targets_BL, CHUNK_TOKENS)

    def own_rows(states_TBLD, head_DV, targets_BL):
        head_DV = _gather(states_TBLD.dtype, head_DV, PartitionSpec("fsdp", None))
        return cross_entropy(states_TBLD, head_DV, targets_BL, CHUNK_TOKENS)

    rows = PartitionSpec(BATCH_AXES, "context")
    loops = PartitionSpec(None, *rows)
    run = per_device(own_rows, (loops, PartitionSpec("fsdp", None), rows), loops)
    return run(states_TBLD, head_DV, batch.targets_BL)


@functools.cache
def compiled_evaluation(config: ModelConfig, mesh: Mesh, num_loops: int):
    """The jitted evaluation (params, batch [B, L], rope_theta) → sums.

    `loss_per_loop` covers loops 1 … `num_loops`, beyond training too; the exit distribution and
    the depth are those of the trained number of loops.
    """
    trained_loops = config.num_loops

    def evaluate(params: Any, batch: Batch, rope_theta: jax.Array) -> Sums:
        require_mesh()
        model = LoopLM(config, attention_for(config, _row_length(mesh, batch), mesh), "none")
        out = cast(LoopOutput, model.apply(
            {"params": params}, batch.tokens_BL, batch.positions_BL, batch.segment_ids_BL,
            num_loops=max(num_loops, trained_loops), rope_theta=rope_theta,
        ))  # fmt: skip
        ce_TBL = _token_losses(out.states_TBLD, params, batch)
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
