"""The compiled optimizer step: any mesh and any accumulation give the numbers of one device.

M microbatches, B rows, L sequence, D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ouro_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from ouro_jax.data.batch import Batch
from ouro_jax.parallel.attention import balance_order
from ouro_jax.parallel.mesh import batch_sharding, make_mesh, use_mesh
from ouro_jax.training.optimizer import make_optimizer
from ouro_jax.training.state import StateFactory
from ouro_jax.training.step import StepInputs, StepSpec, _train_step, compiled_train_step

MODEL = ModelConfig(128, 32, 48, 2, 4, 2, 8, num_loops=3, dtype="float32")
ROWS, LENGTH, STEPS = 16, 16, 10
# Of the rows of each quarter of a batch, so much counts: microbatches weigh very unevenly.
SHARES = (0.95, 0.02, 0.5, 0.1)


def batches(microbatches: int):
    """Ten batches [M, B/M, L] of packed rows; the same numbers however they are split."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(0, 128, (ROWS, LENGTH + 1)).astype(np.int32)
        borders = rng.integers(1, LENGTH, (ROWS, 1))
        places = np.arange(LENGTH)[None]
        segments = np.where(places < borders, 1, 2).astype(np.int32)
        positions = np.where(places < borders, places, places - borders).astype(np.int32)
        mask = rng.random((ROWS, LENGTH)) < np.repeat(SHARES, ROWS // 4)[:, None]
        batch = Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, mask)
        yield jax.tree.map(lambda x: x.reshape(microbatches, -1, LENGTH), batch)


def ten_steps(
    mesh_config, num_devices, microbatches, gather="each_loop", objective="expected", model=MODEL
):
    """Losses, all metrics and the last state."""
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    spec = StepSpec(model, OptimizerConfig(), objective, "uniform", "layer", gather, mesh)
    state = StateFactory(model, OptimizerConfig(), objective, mesh).init(0)
    step = compiled_train_step(spec)
    start = jax.device_get(state.params)
    order = balance_order(LENGTH, mesh.shape["context"])
    history, compiled = [], 0
    with use_mesh(mesh):
        for batch in batches(microbatches):
            batch = jax.tree.map(lambda x_MBL: x_MBL[..., order], batch)
            batch = jax.device_put(batch, batch_sharding(mesh, microbatched=True))
            inputs = StepInputs(*map(np.float32, (1e-3, 0.1, 0.05, 1e4)))
            state, metrics = step(state, batch, inputs)
            history.append(jax.device_get(metrics))
            compiled = compiled or step._cache_size()
    assert step._cache_size() == compiled
    return history, state, start


@pytest.fixture(scope="module")
def one_device():
    return ten_steps(MeshConfig(), 1, 1)


def matrices(params) -> list[np.ndarray]:
    """All but the norms, whose ones would hide differences in what has a standard of 0.02."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    return [leaf for path, leaf in leaves if path[-1].key in ("kernel", "embedding")]


def distance(ours, expected) -> float:
    """Relative Frobenius norm of the difference of two trees."""
    return float(optax.tree.norm(jax.tree.map(np.subtract, ours, expected))
                 / optax.tree.norm(expected))  # fmt: skip


MESHES = {
    "accumulation": (MeshConfig(), 1, 4),
    "data_fsdp_tensor": (MeshConfig(data=2, fsdp=2, tensor=2), 8, 4),
    "slice_fsdp_context": (MeshConfig(slice=2, fsdp=2, context=2), 8, 2),
}


@pytest.mark.parametrize("gather", ["each_loop", "once"])
@pytest.mark.parametrize("layout", MESHES)
def test_ten_steps_are_those_of_one_device(one_device, layout, gather, capsys):
    expected, expected_state, _ = one_device
    history, state, _ = ten_steps(*MESHES[layout], gather)
    worst = max(
        abs(ours["loss"] - plain["loss"]) / abs(plain["loss"])
        for ours, plain in zip(history, expected, strict=True)
    )
    frobenius = distance(matrices(state.params), matrices(expected_state.params))
    with capsys.disabled():
        print(f"\n{layout}: losses differ by {worst:.1e}, parameters by {frobenius:.1e}")
    assert worst <= 1e-5
    assert frobenius <= 1e-5
    for ours, plain in zip(history, expected, strict=True):
        assert ours["num_tokens"] == plain["num_tokens"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), ours, plain)


def test_the_rows_of_a_batch_count_by_token_and_not_by_microbatch(one_device):
    history, _, _ = one_device
    batch = next(batches(4))
    counts = batch.loss_mask_BL.sum((1, 2))
    assert counts.max() > 20 * counts.min() and history[0]["num_tokens"] == counts.sum()


def test_parameters_and_moments_are_split_over_fsdp_and_tensor():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = StateFactory(MODEL, OptimizerConfig(), "expected", mesh).init(0)
    moments = optax.tree.get(state.opt_state, "mu")
    for tree in (state.params, moments):
        layers = tree["stack"]["layers"]
        for leaf, parts in (
            (tree["embed_tokens"]["embedding"], (2, 2)),
            (tree["lm_head"]["kernel"], (2, 2)),
            (layers["self_attn"]["q_proj"]["kernel"], (1, 2, 2, 1)),
            (layers["self_attn"]["o_proj"]["kernel"], (1, 2, 1, 2)),
            (layers["mlp"]["down_proj"]["kernel"], (1, 2, 2)),
            (layers["input_layernorm"]["scale"], (1, 1)),
        ):
            held = leaf.addressable_shards[0].data.shape
            assert held == tuple(size // part for size, part in zip(leaf.shape, parts, strict=True))
    held = sum(shard.data.size for leaf in jax.tree.leaves(state.params)
               for shard in leaf.addressable_shards if shard.device.id == 0)  # fmt: skip
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert held < 0.27 * whole


def test_constraints_are_there_inside_a_mesh_and_outside_it_the_step_refuses():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spec = StepSpec(MODEL, OptimizerConfig(), "expected", "uniform", "layer", "each_loop", mesh)
    state = StateFactory(MODEL, OptimizerConfig(), "expected", mesh).abstract()
    arguments = spec, state, next(batches(2)), StepInputs(1e-3, 0.1, 0.05, 1e4)
    with use_mesh(mesh):
        program = str(jax.make_jaxpr(_train_step, static_argnums=0)(*arguments))
    # Residual streams, heads, MLP and logits are held to their axes.
    for spec_text in ("('slice', 'data', 'fsdp'), 'context', 'tensor'",
                      "('slice', 'data', 'fsdp'), 'context'"):  # fmt: skip
        assert spec_text in program.replace('"', "'")
    assert program.count("sharding_constraint") > 10
    with pytest.raises(RuntimeError, match="use_mesh"):
        jax.make_jaxpr(_train_step, static_argnums=0)(*arguments)


@pytest.mark.parametrize("gather", ["each_loop", "once"])
def test_the_gate_objective_leaves_the_language_model_alone(gather):
    history, state, start = ten_steps(MeshConfig(fsdp=2), 2, 2, gather, objective="gate")
    trained = {"kernel", "bias"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state.params)):
        before = start
        for entry in path:
            before = before[entry.key]
        is_gate = path[1].key == "early_exit_gate"
        assert (leaf.tobytes() != before.tobytes()) == is_gate
        trained -= {path[2].key} if is_gate else set()
    assert not trained
    moments = optax.tree.get(state.opt_state, "mu")
    assert jax.tree.map(jnp.shape, moments) == {
        "stack": {"early_exit_gate": {"kernel": (32, 1), "bias": (1,)}}
    }
    assert set(history[0]["grad_norms"]) == {"gate"}
    assert history[-1]["loss"] < history[0]["loss"]


def test_gradient_norms_of_groups_make_up_the_whole(one_device):
    history, _, _ = one_device
    for metrics in history:
        groups = metrics["grad_norms"]
        assert set(groups) == {"embedding", "attention", "mlp", "norms", "gate", "head"}
        whole = np.sqrt(sum(np.square(value, dtype=float) for value in groups.values()))
        np.testing.assert_allclose(whole, metrics["grad_norm"], rtol=1e-5)
        assert metrics["loss_per_loop"].shape == metrics["exit_distribution"].shape == (3,)
        np.testing.assert_allclose(metrics["exit_distribution"].sum(), 1, rtol=1e-5)
        assert 1 < metrics["mean_depth"] < 3


def test_adamw_by_hand_with_clipping_and_decay_of_matrices_alone():
    rng = np.random.default_rng(0)
    params = {"mlp": {"kernel": rng.normal(size=(3, 2))}, "norm": {"scale": rng.normal(size=3)},
              "gate": {"kernel": rng.normal(size=(3, 1)), "bias": rng.normal(size=1)},
              "embed_tokens": {"embedding": rng.normal(size=(4, 3))}}  # fmt: skip
    config = OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-8, clip_norm=1.0)
    ours = jax.tree.map(jnp.float32, params)
    state = make_optimizer(config, 0.0, 0.0).init(ours)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    decays = [path[-1].key in ("kernel", "embedding") for path in paths]
    plain, tree = jax.tree.flatten(params)

    @jax.jit
    def update(gradients, state, params, rate, decay):
        updates, state = make_optimizer(config, rate, decay).update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    first, second = [[np.zeros_like(p) for p in plain] for _ in range(2)]
    for number in range(1, 6):
        rate, decay = 0.01 * number, 0.1 * number
        # Of norm below 1 in the first step, above it in the others.
        gradients = [rng.normal(size=p.shape) * 0.05 * number**2 for p in plain]
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        assert (norm > 1) == (number > 1)
        clipped = [g / max(1.0, norm) for g in gradients]
        for i, gradient in enumerate(clipped):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.95 * second[i] + 0.05 * gradient**2
            move = first[i] / (1 - 0.9**number)
            move = move / (np.sqrt(second[i] / (1 - 0.95**number)) + 1e-8)
            plain[i] = plain[i] - rate * (move + decay * decays[i] * plain[i])
        given = jax.tree.unflatten(tree, [jnp.float32(g) for g in gradients])
        ours, state = update(given, state, ours, rate, decay)
    for our, expected in zip(jax.tree.leaves(ours), plain, strict=True):
        np.testing.assert_allclose(our, expected, rtol=2e-5, atol=1e-6)
