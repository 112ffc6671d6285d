"""The judgement of a step: robust deviations by hand, and a refused step that changes no bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ouro_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from ouro_jax.data.batch import Batch
from ouro_jax.parallel.mesh import make_mesh, use_mesh
from ouro_jax.training.guard import LEAST, WINDOW, GuardState, fresh_guard, judge
from ouro_jax.training.state import StateFactory
from ouro_jax.training.step import StepInputs, StepSpec, compiled_train_step, requests_sharding

MODEL = ModelConfig(64, 16, 24, 1, 2, 2, 8, num_loops=2, dtype="float32")


def seen(values) -> GuardState:
    guard = fresh_guard()
    for value in values:
        _, guard = judge(guard, jnp.float32(value), jnp.float32(10 * value), np.inf)
    return guard


def test_deviations_are_those_of_numpy():
    values = np.random.default_rng(0).normal(2.0, 0.3, WINDOW + 40).astype(np.float32)
    guard = seen(values)
    window = values[-WINDOW:]
    np.testing.assert_array_equal(guard.losses_W, window)
    median = np.median(window)
    deviation = 1.4826 * np.median(np.abs(window - median))
    verdict, after = judge(guard, jnp.float32(3.5), jnp.float32(35.0), np.inf)
    np.testing.assert_allclose(verdict.loss_deviations, (3.5 - median) / deviation, rtol=1e-5)
    np.testing.assert_allclose(verdict.grad_norm_deviations, verdict.loss_deviations, rtol=1e-4)
    assert verdict.accepted
    assert after.losses_W[-1] == 3.5 and after.losses_W[-2] == window[-1]


@pytest.mark.parametrize(("loss", "norm", "accepted"), [
    (2.1, 20.0, True), (4.0, 20.0, False), (2.0, 90.0, False), (0.1, 0.1, True),
    (np.nan, 20.0, False), (2.0, np.inf, False),
])  # fmt: skip
def test_only_what_is_far_above_or_not_finite_is_refused(loss, norm, accepted):
    values = np.random.default_rng(0).normal(2.0, 0.1, WINDOW)
    verdict, _ = judge(seen(values), jnp.float32(loss), jnp.float32(norm), 6.0)
    assert bool(verdict.accepted) == accepted


def test_nothing_is_a_spike_before_enough_was_seen():
    for count, accepted in ((LEAST - 1, True), (LEAST, False)):
        verdict, _ = judge(seen([2.0] * count), jnp.float32(50.0), jnp.float32(20.0), 6.0)
        assert bool(verdict.accepted) == accepted
        assert np.isnan(verdict.loss_deviations) == accepted


def test_a_loss_that_stands_still_may_move_by_a_few_percent():
    guard = seen([2.0] * WINDOW)
    for loss, accepted in ((2.11, True), (2.13, False)):  # 6 × 1 % of 2.0
        assert bool(judge(guard, jnp.float32(loss), jnp.float32(20.0), 6.0)[0].accepted) == accepted


@pytest.fixture(scope="module")
def trained():
    """A compiled step on 2 devices, a state after one step, and its batch."""
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    spec = StepSpec(MODEL, OptimizerConfig(), "expected", "uniform", "none", "once", mesh)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 2, 9)).astype(np.int32)
    ones = np.ones((1, 2, 8), np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (1, 2, 8))
    batch = Batch(tokens[..., :-1], tokens[..., 1:], ones, positions, ones.astype(bool))
    step = compiled_train_step(spec)

    def run(state, **changes):
        requests = jax.device_put(np.array([0, 2], np.int32), requests_sharding(mesh))
        numbers = map(np.float32, (1e-3, 0.1, 0.05, 1e4, np.inf))
        inputs = StepInputs(*numbers, step=np.int32(1), requests=requests)._replace(**changes)
        with use_mesh(mesh):
            return step(jax.tree.map(jnp.copy, state), batch, inputs)

    state = StateFactory(MODEL, OptimizerConfig(), "expected", mesh).init(0)
    return run, run(state, step=np.int32(0))[0]


@pytest.mark.parametrize("changes", [
    {"entropy_weight": np.float32(np.nan)}, {"step": np.int32(0)}, {"step": np.int32(2)},
], ids=["not finite", "late", "early"])  # fmt: skip
def test_a_refused_step_changes_no_bit(trained, changes):
    run, state = trained
    after, metrics = run(state, **changes)
    assert not metrics["accepted"] and after.step == 1
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_an_accepted_step_trains_and_tells_the_highest_request(trained):
    run, state = trained
    after, metrics = run(state)
    assert metrics["accepted"] and after.step == 2 and metrics["request"] == 2
    assert after.guard.losses_W[-1] == metrics["loss"]
    assert after.guard.losses_W[-2] == state.guard.losses_W[-1]
    kernels = (tree.params["lm_head"]["kernel"] for tree in (state, after))
    assert not np.array_equal(*map(np.asarray, kernels))
