"""Exit distribution and exit rules, against slow numpy float64 and the published decisions."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from ouro_jax.errors import ConfigError
from ouro_jax.model.exit import (
    ExitRule,
    confidence_exit,
    exit_distribution,
    hidden_difference_exit,
    log_exit_distribution,
    lookahead_exit,
    parse_exit_rule,
    q_exit,
    select_exit,
    static_exit,
)

GATES_TBL = st_numpy.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.just(2), st.just(3)),
    elements=st.floats(-12, 12, width=32),
)


def gates(seed: int, loops: int = 4, tokens: int = 500, scale: float = 4.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(loops, 2, tokens)) * scale).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(GATES_TBL)
def test_distribution_equals_the_float64_product(gate_logits_TBL):
    pdf_TBL = exit_distribution(jnp.array(gate_logits_TBL))
    assert pdf_TBL.dtype == jnp.float32
    np.testing.assert_allclose(pdf_TBL, reference.exit_pdf(gate_logits_TBL), rtol=2e-5, atol=1e-30)
    np.testing.assert_allclose(pdf_TBL.sum(axis=0), 1.0, rtol=1e-6)


def test_the_gate_of_the_last_loop_has_no_effect():
    gate_logits_TBL = gates(0)
    changed_TBL = gate_logits_TBL.copy()
    changed_TBL[-1] += 5
    np.testing.assert_array_equal(
        exit_distribution(jnp.array(gate_logits_TBL)), exit_distribution(jnp.array(changed_TBL))
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_saturated_gates_keep_values_and_gradients_finite(dtype):
    gate_logits_TBL = jnp.array([[100.0, -100.0, 100.0], [100.0, -100.0, -100.0], [0, 0, 0]], dtype)

    def entropy(gate_logits_TBL):
        log_pdf_TBL = log_exit_distribution(gate_logits_TBL)
        return -jnp.sum(jnp.exp(log_pdf_TBL) * log_pdf_TBL)

    assert np.isfinite(log_exit_distribution(gate_logits_TBL)).all()
    assert np.isfinite(np.float32(jax.grad(entropy)(gate_logits_TBL))).all()
    # The second loop of a gate that has surely left: ln p = -100 + ln σ(100), not ln 0.
    np.testing.assert_allclose(log_exit_distribution(gate_logits_TBL)[1, 0], -100, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(GATES_TBL, st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_a_higher_q_never_exits_earlier(gate_logits_TBL, qs):
    low, high = sorted(qs)
    steps = [q_exit(jnp.array(gate_logits_TBL), q) for q in (low, high, 1.0)]
    assert (steps[0] <= steps[1]).all() and (steps[1] <= steps[2]).all()
    assert (steps[2] == len(gate_logits_TBL) - 1).all()


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.9, 0.99])
def test_q_exit_equals_float64_where_no_decision_hangs_on_rounding(q):
    gate_logits_TBL = gates(1)
    clear_TBL = np.abs(np.cumsum(reference.exit_pdf(gate_logits_TBL), axis=0) - q) > 1e-6
    step_BL = q_exit(jnp.array(gate_logits_TBL), q)
    assert step_BL.dtype == jnp.int32
    expected_BL = reference.exit_step(gate_logits_TBL, q)
    clear_BL = clear_TBL.all(axis=0)
    assert clear_BL.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(step_BL)[clear_BL], expected_BL[clear_BL])


def test_q_of_one_is_the_last_loop_even_for_gates_that_are_sure():
    assert (q_exit(jnp.full((4, 1, 3), 100.0), 1.0) == 3).all()
    assert (q_exit(jnp.full((4, 1, 3), 100.0), 0.9999) == 0).all()


def test_q_may_differ_from_row_to_row():
    gate_logits_TBL = jnp.zeros((4, 3, 2))
    step_BL = q_exit(gate_logits_TBL, jnp.array([[0.5], [0.75], [1.0]]))
    np.testing.assert_array_equal(step_BL, [[0, 0], [1, 1], [3, 3]])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_rounding_reproduces_every_published_decision(golden_dir, dtype, jit):
    cases = json.loads((golden_dir / "edge_cases.json").read_text())["exit_steps_from_gate_logits"]
    cases = [case for case in cases if case["dtype"] == dtype]
    assert sum(len(case["exit_step"]) for case in cases) == 112
    for case in cases:

        def decide(gate_logits_TB, threshold=case["threshold"]):
            return q_exit(gate_logits_TB, threshold, published_rounding=dtype)

        gate_logits_TB = jnp.array(case["gate_logits"], jnp.float32).T
        step_B = (jax.jit(decide) if jit else decide)(gate_logits_TB)
        np.testing.assert_array_equal(step_B, case["exit_step"], err_msg=str(case["threshold"]))


@pytest.mark.parametrize("loops", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_published_rounding_equals_numpy_rounding_at_every_product(dtype, loops):
    """Under jit: XLA may neither fuse product and sum nor drop the casts."""
    gate_logits_TBL = gates(2, loops, tokens=20_000, scale=8.0)
    halt_TBL = np.asarray(jax.nn.sigmoid(jnp.array(gate_logits_TBL))).astype(dtype)
    one = dtype(1)
    remaining_BL = np.ones_like(halt_TBL[0])
    total_BL = np.zeros(remaining_BL.shape, np.float64)
    expected_BL = np.full(remaining_BL.shape, loops - 1)
    undecided_BL = np.ones(remaining_BL.shape, bool)
    for loop in range(loops - 1):
        total_BL += (halt_TBL[loop] * remaining_BL).astype(np.float64)
        leaves_BL = undecided_BL & (total_BL.astype(dtype) >= one)
        expected_BL[leaves_BL] = loop
        undecided_BL &= ~leaves_BL
        remaining_BL = remaining_BL * (one - halt_TBL[loop])
    step_BL = jax.jit(lambda x: q_exit(x, 1.0, published_rounding=dtype))(gate_logits_TBL)
    np.testing.assert_array_equal(step_BL, expected_BL)


def test_static_exit_takes_the_depth_that_was_run():
    np.testing.assert_array_equal(static_exit(jnp.zeros((3, 1, 2)), 2), [[1, 1]])
    with pytest.raises(ConfigError, match=r"static:4.*1 to 3 loops"):
        static_exit(jnp.zeros((3, 1, 2)), 4)


def test_hidden_difference_exits_at_the_first_state_that_settled():
    rng = np.random.default_rng(3)
    states_TBLD = np.cumsum(rng.normal(size=(5, 2, 50, 4)) * rng.uniform(size=(5, 2, 50, 1)), 0)
    expected_BL = np.full((2, 50), 4)
    for loop in (3, 2, 1):
        moved_BL = np.sqrt(((states_TBLD[loop] - states_TBLD[loop - 1]) ** 2).sum(-1))
        expected_BL[moved_BL < 0.7] = loop
    assert set(expected_BL.flat) == {1, 2, 3, 4}
    np.testing.assert_array_equal(hidden_difference_exit(jnp.array(states_TBLD), 0.7), expected_BL)
    assert (hidden_difference_exit(jnp.array(states_TBLD[:1]), 0.7) == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_confidence_exits_at_the_first_sure_loop(dtype):
    logits_TBLV = jnp.array(np.random.default_rng(4).normal(size=(4, 2, 50, 7)) * 3, dtype)
    wide = np.exp(np.asarray(logits_TBLV, np.float64))
    sure_TBL = (wide / wide.sum(-1, keepdims=True)).max(-1) >= 0.8
    sure_TBL[-1] = True
    assert set(sure_TBL.argmax(0).flat) == {0, 1, 2, 3}
    np.testing.assert_array_equal(confidence_exit(logits_TBLV, 0.8), sure_TBL.argmax(0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_confidence_holds_no_second_set_of_logits(dtype):
    logits_TBLV = jax.ShapeDtypeStruct((8, 1, 64, 1024), dtype)
    compiled = jax.jit(lambda logits_TBLV: confidence_exit(logits_TBLV, 0.8)).lower(logits_TBLV)
    temporaries = compiled.compile().memory_analysis().temp_size_in_bytes
    assert temporaries < logits_TBLV.size * logits_TBLV.dtype.itemsize / 10


def test_select_exit_picks_each_tokens_own_loop():
    states_TBLD = jnp.arange(3 * 2 * 2 * 2, dtype=jnp.bfloat16).reshape(3, 2, 2, 2)
    step_BL = jnp.array([[0, 2], [1, 0]])
    state_BLD = select_exit(states_TBLD, step_BL)
    assert state_BLD.dtype == jnp.bfloat16
    for row in range(2):
        for token in range(2):
            expected = states_TBLD[step_BL[row, token], row, token]
            np.testing.assert_array_equal(state_BLD[row, token], expected)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("static:2", ExitRule("static", 2)),
        ("q:0.8", ExitRule("q", 0.8)),
        ("q:1", ExitRule("q", 1)),
        ("hidden:0.05", ExitRule("hidden", 0.05)),
        ("confidence:0.9", ExitRule("confidence", 0.9)),
    ],
)
def test_exit_rules_are_read(text, rule):
    assert parse_exit_rule(text) == rule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("statc:2", "Did you mean 'static'"),
        ("0.8", "unknown exit rule '0.8'"),
        ("", "KIND:VALUE"),
        ("q", "from 0 to 1"),
        ("q:1.5", "from 0 to 1"),
        ("q:nan", "from 0 to 1"),
        ("static:0", "at least 1"),
        ("static:1.5", "whole number"),
        ("static:inf", "whole number"),
        ("hidden:0", "greater than 0"),
        ("hidden:inf", "greater than 0"),
        ("confidence:-0.1", "from 0 to 1"),
    ],
)
def test_wrong_exit_rules_say_what_is_valid(text, expected):
    with pytest.raises(ConfigError, match="--exit") as error:
        parse_exit_rule(text)
    assert repr(text) in str(error.value) and expected in str(error.value)


@settings(max_examples=50, deadline=None)
@given(GATES_TBL, st.floats(0.01, 0.99))
def test_lookahead_foretells_a_gate_from_the_one_before(gate_logits_TBL, q):
    halt_TBL = 1 / (1 + np.exp(-gate_logits_TBL.astype(np.float64)))
    loops = len(halt_TBL)
    expected_BL = np.full(halt_TBL.shape[1:], loops - 1)
    margin_BL = np.full(halt_TBL.shape[1:], np.inf)
    for loop in reversed(range(1, loops)):
        before_BL = np.prod(1 - halt_TBL[:loop], axis=0)
        foretold_BL = 1 - before_BL * (1 - halt_TBL[loop - 1])
        expected_BL = np.where(foretold_BL >= q, loop, expected_BL)
        margin_BL = np.minimum(margin_BL, abs(foretold_BL - q))
    step_BL = np.asarray(lookahead_exit(jnp.array(gate_logits_TBL), q))
    sure_BL = margin_BL > 1e-5
    np.testing.assert_array_equal(step_BL[sure_BL], expected_BL[sure_BL])


def test_lookahead_knows_before_a_loop_whether_it_is_the_last():
    """The gate of a loop has no say in whether the token leaves after it; q = 1 never leaves."""
    gate_logits_TBL = gates(4)
    step_BL = np.asarray(lookahead_exit(jnp.array(gate_logits_TBL), 0.7))
    assert set(np.unique(step_BL)) == {1, 2, 3}
    changed_TBL = gate_logits_TBL.copy()
    np.put_along_axis(changed_TBL, step_BL[None], 9.0, axis=0)
    np.testing.assert_array_equal(lookahead_exit(jnp.array(changed_TBL), 0.7), step_BL)
    assert (np.asarray(lookahead_exit(jnp.array(gate_logits_TBL + 50), 1.0)) == 3).all()
