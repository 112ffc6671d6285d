"""Probes and agreement: against the model's direct answers, and states whose AUC is known."""

import functools

import jax
import numpy as np
import pytest
from studied import VOCAB, subject

from ouro_jax.errors import ConfigError
from ouro_jax.experiments import probes
from ouro_jax.experiments.probes import Questions, agreement, probe, run_faithfulness
from ouro_jax.model.loop_lm import LoopLM

COUNT, LOOPS = 60, 5


@functools.cache
def questions(**changes):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in rng.integers(3, 12, COUNT)]
    return Questions("random", prompts, range(VOCAB), frozenset(range(0, VOCAB, 2)), **changes)


def test_answers_are_the_most_probable_tokens_at_each_depth():
    # Every token is a candidate, and prompts of all lengths are padded to one.
    observed = probes.observe(subject(), questions(), LOOPS)
    assert observed.states_TNBD.shape == (4, 2, COUNT, 32)
    tokens_BL = np.zeros((COUNT, 11), np.int32)
    for row, prompt in enumerate(questions().prompts):
        tokens_BL[row, : len(prompt)] = prompt
    model, params = LoopLM(subject().config), {"params": subject().params}
    out = jax.jit(model.apply, static_argnames="num_loops")(params, tokens_BL, num_loops=LOOPS)
    lengths_B = np.array([len(prompt) for prompt in questions().prompts])
    states_TBD = np.asarray(out.states_TBLD)[:, np.arange(COUNT), lengths_B - 1]
    logits_TBV = states_TBD @ np.asarray(subject().params["lm_head"]["kernel"])
    np.testing.assert_array_equal(observed.answers_TB, logits_TBV.argmax(axis=-1))


def test_all_records_of_a_model_are_written_once(tmp_path, monkeypatch):
    path = tmp_path / "faithfulness.jsonl"
    records = run_faithfulness(subject(), questions(), path, LOOPS)
    agreed, *probed = records
    assert np.shape(agreed["matrix"]) == (LOOPS, LOOPS) and agreed["trained_loops"] == 4
    places = [(record["step"], record["loop"], record["layer"]) for record in probed]
    assert places == [
        (step, loop, layer) for step in (2, 3, 4) for loop in range(1, step + 1) for layer in (1, 2)
    ]
    at_its_own = [r["auc"] for r in probed if r["loop"] == r["step"] and r["layer"] == 2]
    controls = [record["control_auc"] for record in probed]
    assert abs(np.mean(controls) - 0.5) < 0.05
    # What a loop answers is read off its last state by the head: a probe must do better than none.
    assert np.mean(at_its_own) > np.mean(controls) + 0.05

    monkeypatch.setattr(probes, "observe", lambda *_: pytest.fail("computed again"))
    said = []
    assert run_faithfulness(subject(), questions(), path, LOOPS, said.append) == records
    assert all(line.endswith("found") for line in said)


def test_agreement_counts_equal_answers():
    answers_TB = np.random.default_rng(1).integers(0, 3, (LOOPS, COUNT))
    truth = np.random.default_rng(2).integers(0, 3, COUNT)
    asked = Questions("three", [[1]] * COUNT, (5, 6, 7), frozenset({0, 2}), truth.tolist())
    record = agreement(answers_TB, asked)
    matrix = record["matrix"]
    assert (matrix == matrix.T).all() and (matrix.diagonal() == COUNT).all()
    for i in range(LOOPS):
        for j in range(LOOPS):
            same = sum(a == b for a, b in zip(answers_TB[i], answers_TB[j], strict=True))
            assert matrix[i, j] == same
    assert record["accuracy_per_loop"].tolist() == [np.mean(row == truth) for row in answers_TB]
    assert record["positive_per_loop"].tolist() == [np.mean(row != 1) for row in answers_TB]


def test_a_probe_finds_what_is_there_and_shuffled_answers_leave_nothing():
    rng = np.random.default_rng(3)
    labels_B = rng.random(400) < 0.3
    noise_BD = rng.normal(size=(400, 16))
    planted_BD = noise_BD.copy()
    planted_BD[:, 5] = 100 + 3 * labels_B + rng.normal(size=400)  # 3 deviations: AUC 0.983
    found = probe(planted_BD, labels_B, seed=1)
    assert found["auc"] > 0.95 and abs(found["control_auc"] - 0.5) < 0.06
    assert abs(probe(noise_BD, labels_B, seed=1)["auc"] - 0.5) < 0.12
    few_B = np.arange(400) < 9
    assert probe(noise_BD, few_B, seed=1) == {"rarer": 9, "auc": None, "control_auc": None}


def test_balanced_answers_are_relative_to_the_other_prompts():
    prompts = questions().prompts
    plain, balanced = (
        probes.observe(subject(), Questions("two", prompts, (3, 4), balanced=flag), LOOPS)
        for flag in (False, True)
    )
    for ours_B, theirs_B in zip(balanced.answers_TB, plain.answers_TB, strict=True):
        assert abs(ours_B.mean() - 0.5) < 0.2
        # Taking off two constants moves one threshold: answers change in one direction only.
        assert len(set((ours_B - theirs_B).tolist()) - {0}) <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], (1, 2)), "prompts = 0"),
        (([[1], []], (1, 2)), "prompts = 2: expected at least one, and none empty"),
        (([[1]], (1, 1)), "candidates = .1, 1.: expected two or more different"),
        (([[1]], (1, 2), frozenset({0, 1})), "positive = .0, 1.: expected some but not all"),
        (([[1]], (1, 2), frozenset({2})), "positive = .2.: expected some but not all"),
    ],
)
def test_questions_that_say_nothing_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        Questions("wrong", *arguments)


def test_fewer_loops_than_trained_are_refused():
    with pytest.raises(ConfigError, match="num_loops = 3: expected at least the 4"):
        run_faithfulness(subject(), questions(), None, 3)
