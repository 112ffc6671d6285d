"""Scores of continuations against the model in numpy float64, one unpadded row at a time."""

import numpy as np
import pytest
import reference

from ouro_jax.errors import ConfigError
from ouro_jax.experiments.scoring import score
from ouro_jax.interop.huggingface import load_huggingface


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Fields and tensors of a model of four loops, and what we load of them."""
    fields, tensors = reference.random_checkpoint(np.random.default_rng(5), layers=1, vocab=80)
    folder = reference.write_checkpoint(tmp_path_factory.mktemp("model"), fields, tensors)
    return fields, tensors, *load_huggingface(folder)


def random_pairs(seed, count=12):
    numbers = np.random.default_rng(seed)
    sizes = zip(numbers.integers(1, 60, count), numbers.integers(1, 9, count), strict=True)
    return [tuple(numbers.integers(0, 80, size).tolist() for size in pair) for pair in sizes]


def by_hand(fields, tensors, pair, loops, exit_step):
    """ln p, greediness, summed depth; `exit_step` gets a token's states, gates and logits [T, …]"""
    row = [*pair[0], *pair[1]]
    out = reference.forward(fields, tensors, np.array([row[:-1]]), num_loops=loops)
    total, greedy, depth = 0.0, True, 0
    for place in range(len(pair[0]) - 1, len(row) - 1):
        at = (slice(None), 0, place)
        step = exit_step(out.states_TBLD[at], out.gate_logits_TBL[at], out.logits_TBLV[at])
        logits_V = out.logits_TBLV[step, 0, place]
        total += logits_V[row[place + 1]] - np.logaddexp.reduce(logits_V)
        greedy &= bool(logits_V.argmax() == row[place + 1])
        depth += step + 1
    return total, greedy, depth


def first(true_T):
    return int(np.argmax([*true_T[:-1], True]))


def moved(states_TD):
    return np.linalg.norm(np.diff(states_TD, axis=0), axis=-1)


def certainty(logits_TV):
    return np.exp(logits_TV.max(-1) - np.logaddexp.reduce(logits_TV, axis=-1))


def foretold(gates_T, q):
    """The cumulative probability at loop t with gate t - 1 in the place of gate t."""
    halts_T = 1 / (1 + np.exp(-gates_T))
    remaining = [np.prod(1 - halts_T[:t]) * (1 - halts_T[t - 1]) for t in range(1, len(halts_T))]
    return [False, *(1 - np.array(remaining) >= q)]


RULES = {
    "q:0.6": lambda states, gates, logits: int(reference.exit_step(gates, 0.6)),
    "lookahead:0.7": lambda states, gates, logits: first(foretold(gates, 0.7)),
    "hidden:3.5": lambda states, gates, logits: first([False, *(moved(states) < 3.5)]),
    "confidence:0.2": lambda states, gates, logits: first(certainty(logits) >= 0.2),
    "static:2": lambda states, gates, logits: 1,
    None: lambda states, gates, logits: len(gates) - 1,
}


@pytest.mark.parametrize("exit", RULES)
def test_scores_are_those_of_the_float64_model(model, exit):
    fields, tensors, config, params = model
    pairs = random_pairs(0)
    # Two batches where nothing else is to be seen, and more loops than there were.
    loops, batch_tokens = (5, 512) if exit is None else (4, 1024)
    found = score(config, params, pairs, loops, exit, batch_tokens=batch_tokens)
    expected = [by_hand(fields, tensors, pair, loops, RULES[exit]) for pair in pairs]
    assert np.allclose([x.logprob for x in found], [x[0] for x in expected], atol=1e-4, rtol=0)
    assert [x.greedy for x in found] == [x[1] for x in expected]
    assert [x.depth for x in found] == [x[2] for x in expected]
    if exit not in (None, "static:2"):
        assert len({x.depth / len(pair[1]) for x, pair in zip(found, pairs, strict=True)}) > 1


def test_one_row_serves_all_answers_of_one_token(model):
    *_, config, params = model
    counts = []
    pairs = [([1, 2, 3], [token]) for token in range(80)]
    found = score(config, params, pairs, on_scored=counts.append, batch_tokens=32)
    assert counts == [80]
    assert np.isclose(np.exp([x.logprob for x in found]).sum(), 1, atol=1e-5)
    assert sum(x.greedy for x in found) == 1


def test_many_positions_go_through_the_head_in_chunks(model):
    *_, config, params = model
    pairs = [([token], list(range(70))) for token in range(16)]  # 1,120 positions
    together = score(config, params, pairs, exit="confidence:0.2")
    for pair, found in zip(pairs[:3], together, strict=False):
        (alone,) = score(config, params, [pair], exit="confidence:0.2")
        assert found.logprob == pytest.approx(alone.logprob, abs=1e-4)
        assert found.depth == alone.depth


def test_a_long_context_is_cut_on_the_left(model):
    *_, config, params = model
    context, continuation = list(range(60)), [7, 8, 9]
    # Three tokens are predicted from 16 positions: the last 14 of the context and two of its own.
    (cut,) = score(config, params, [(context, continuation)], window=16)
    (short,) = score(config, params, [(context[-14:], continuation)])
    assert cut.logprob == pytest.approx(short.logprob, abs=1e-5)


def test_what_cannot_be_scored(model):
    *_, config, params = model
    assert score(config, params, []) == []
    for pairs, settings, error in (
        ([([1], [])], {}, "at least one token"),
        ([([1], [2] * 9)], {"window": 8}, "9 tokens does not fit into the window of 8"),
        ([([1], [2])], {"loops": 0}, "loops = 0"),
        ([([1], [2])], {"loops": 2, "exit": "static:3"}, "at most the 2 loops"),
        ([([1], [2])], {"exit": "often:3"}, "unknown exit rule"),
    ):
        with pytest.raises(ConfigError, match=error):
            score(config, params, pairs, **settings)
