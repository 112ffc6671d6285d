"""Exit records against the rules written out in numpy float64 on whole logits."""

import functools

import numpy as np
import pytest
from studied import VOCAB, heldout, log_softmax, subject, whole_logits

from ouro_jax.experiments.exits import run_exits

LOOPS = 4


@functools.cache
def records():
    return run_exits([subject()], heldout(), None)


def record(**wanted):
    (found,) = [entry for entry in records() if wanted.items() <= entry.items()]
    return found


@functools.cache
def by_hand():
    """(loss, correct, confidence, gate probability λ, change of state), [T, N] each."""
    parts = []
    for seed in range(2):
        for index in range(2):
            logits_TNV, gates_TN, states_TND, targets_N = whole_logits(LOOPS, seed, index)
            logp_TNV = log_softmax(logits_TNV)
            loss_TN = -logp_TNV[:, np.arange(len(targets_N)), targets_N]
            moved_TN = np.linalg.norm(np.diff(states_TND, axis=0), axis=-1)
            never_1N = np.full((1, len(targets_N)), np.inf)
            parts.append((
                loss_TN, logits_TNV.argmax(-1) == targets_N, np.exp(logp_TNV.max(-1)),
                1 / (1 + np.exp(-gates_TN)), np.concatenate([never_1N, moved_TN]),
            ))  # fmt: skip
    return [np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)]


def leaves(rule, value, token):
    """Whether a token leaves after loop t, for t = 0 … T-1: the rules in plain words."""
    _, _, confidence, halt, moved = (array[:, token] for array in by_hand())
    if rule == "static":
        return np.arange(LOOPS) >= value - 1
    if rule == "confidence":
        return confidence >= value
    if rule == "hidden":
        return moved < value
    gone = 1 - np.cumprod(1 - halt)
    if rule == "lookahead":
        remaining = np.cumprod(1 - halt)
        gone = np.concatenate([[-1.0], 1 - remaining[:-1] * (1 - halt[:-1])])
    return (gone >= value) & (value < 1)


@pytest.mark.parametrize("rule", ["static", "q", "lookahead", "hidden", "confidence"])
def test_points_equal_a_search_over_whole_logits(rule):
    loss_TN, correct_TN, *_ = by_hand()
    points = record(kind="exits", rule=rule)["points"]
    assert len(points) >= LOOPS
    for point in points:
        exits = [
            next((t for t in range(LOOPS) if leaves(rule, point["value"], token)[t]), LOOPS - 1)
            for token in range(loss_TN.shape[1])
        ]
        taken = (exits, range(len(exits)))
        assert point["mean_depth"] == pytest.approx(np.mean(exits) + 1, abs=1e-9)
        assert point["loss"] == pytest.approx(loss_TN[taken].mean(), rel=1e-5)
        assert point["accuracy"] == pytest.approx(correct_TN[taken].mean())


def test_depth_grows_with_the_value_and_ends_at_the_static_depths():
    static = record(kind="exits", rule="static")["points"]
    for rule in ("q", "lookahead", "confidence"):
        depths = [point["mean_depth"] for point in record(kind="exits", rule=rule)["points"]]
        assert depths == sorted(depths) and depths[0] < depths[-1]
    q = record(kind="exits", rule="q")["points"]
    assert q[0]["mean_depth"] == 1 and q[0]["loss"] == static[0]["loss"]
    assert q[-1]["mean_depth"] == LOOPS and q[-1]["loss"] == static[-1]["loss"]
    hidden = [point["mean_depth"] for point in record(kind="exits", rule="hidden")["points"]]
    assert hidden == sorted(hidden, reverse=True)


def test_the_share_of_flops_is_counted_by_hand():
    # A layer: q and o 2 × 32 × 32, k and v 2 × 32 × 16, MLP 3 × 32 × 48; attention 2 × 32 × 25/2.
    layer, head = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 32 * 25), 2 * 32 * VOCAB
    whole = 4 * 2 * layer + head
    for point in record(kind="exits", rule="q")["points"]:
        expected = (point["mean_depth"] * 2 * layer + head) / whole
        assert point["flops"] == pytest.approx(expected)
    for point in record(kind="exits", rule="confidence")["points"]:
        expected = point["mean_depth"] * (2 * layer + head) / whole
        assert point["flops"] == pytest.approx(expected)


def test_calibration_counts_every_token_once_at_each_gate():
    loss_TN, _, _, halt_TN, _ = by_hand()
    gained_TN = loss_TN[:-1] - loss_TN[1:]
    for loop, gates in (("own", (2, 3, 4)), ("next", (1, 2, 3))):
        bins = record(kind="calibration", loop=loop)["bins"]
        for gate, gained_N in zip(gates, gained_TN, strict=True):
            target_N = 1 / (1 + np.exp(-50 * (np.where(gained_N > 0, gained_N, 0) - 0.005)))
            mine = [entry for entry in bins if entry["gate"] == gate]
            tokens = np.array([entry["tokens"] for entry in mine])
            assert tokens.sum() == loss_TN.shape[1] and np.ptp(tokens) <= 1
            for field, expected in (
                ("observed", gained_N > 0.005), ("target", target_N),
                ("predicted", 1 - halt_TN[gate - 1]),
            ):  # fmt: skip
                mean = np.average([entry[field] for entry in mine], weights=tokens)
                assert mean == pytest.approx(expected.mean(), rel=1e-5)
            predicted = [entry["predicted"] for entry in mine]
            assert predicted == sorted(predicted)


def test_expected_loss_is_the_mean_over_the_exit_distribution():
    loss_TN, _, _, halt_TN, _ = by_hand()
    before_TN = np.cumprod(np.concatenate([np.ones_like(halt_TN[:1]), 1 - halt_TN[:-1]]), axis=0)
    halt_TN = np.concatenate([halt_TN[:-1], np.ones_like(halt_TN[:1])])
    expected = (before_TN * halt_TN * loss_TN).sum(axis=0)
    found = record(kind="expected")
    assert found["expected"] == pytest.approx(expected.mean(), rel=1e-5)
    at_half = next(p for p in record(kind="exits", rule="q")["points"] if p["value"] == 0.5)
    assert found["realised"] == pytest.approx(at_half["loss"])
    assert found["realised_depth"] == pytest.approx(at_half["mean_depth"])
    assert found["best"] <= min(found["expected"], found["realised"])
