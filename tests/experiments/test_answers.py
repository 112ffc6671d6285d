"""Scores of answers against a direct computation on all logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ouro_jax.config import ModelConfig
from ouro_jax.data.mixture import open_source
from ouro_jax.data.packing import Document
from ouro_jax.data.tasks.mano import Mano
from ouro_jax.data.tasks.rows import build_task, make_task
from ouro_jax.experiments.answers import has_many_answers, judge_answers, score_answers
from ouro_jax.model.loop_lm import LoopLM
from ouro_jax.training.state import abstract_params

TASK = {"name": "mano", "max_length": 2, "modulus": 3, "heldout_problems": 12}
LENGTH = 20


def random_model(vocab_size):
    model = ModelConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
        num_kv_heads=2, head_dim=8, num_loops=2, initializer_range=0.3,
        embedding_initializer_range=1.0, dtype="float32",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape), jnp.float32),
        abstract_params(model),
    )
    return model, params


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    root = build_task(tmp_path_factory.mktemp("tasks"), TASK, [LENGTH])
    task = make_task(TASK)
    return task, open_source(root, "mano", "heldout", LENGTH), *random_model(len(task.vocabulary))


def logits_of(model, params, prompts, loops):
    """Logits at the last place of equally long prompts, float64 [B, V]."""
    tokens = jnp.asarray(np.stack(prompts))
    lm = LoopLM(model)
    states = lm.apply({"params": params}, tokens, num_loops=loops).states_TBLD[-1]
    return np.asarray(lm.apply({"params": params}, states, method="logits")[:, -1], np.float64)


def test_scores_equal_a_direct_computation(opened):
    task, rows, model, params = opened
    scores = score_answers(model, params, rows, (1, 3))
    problems = np.stack([problem.tokens for problem in task.heldout("mano")])
    answers = problems[:, -1:]
    for score in scores:
        logits = logits_of(model, params, problems[:, :-1], score.loops)
        exact = logits.argmax(1) == answers[:, 0]
        nats = np.log(np.exp(logits).sum(1)) - np.take_along_axis(logits, answers, 1)[:, 0]
        assert score.problems == len(problems) == 12
        assert score.exact == pytest.approx(exact.mean()) == pytest.approx(score.token_accuracy)
        assert score.nats == pytest.approx(nats.mean(), abs=1e-4)
    assert scores[0].nats != scores[1].nats


ENDS = ((0, 0), (0, 5), (5, 5))


@dataclasses.dataclass(frozen=True)
class LongAnswers(Mano):
    """The last two tokens are the answer: in turns two zeros, one, none."""

    def heldout(self, name):
        problems = []
        for number, problem in enumerate(super().heldout(name)):
            tokens = np.array([*problem.tokens[:-2], *ENDS[number % 3]], np.int32)
            problems.append(Document(tokens, np.arange(len(tokens)) >= len(tokens) - 2))
        return problems


def test_a_problem_is_right_when_all_tokens_of_its_answer_are(tmp_path, monkeypatch):
    monkeypatch.setattr("ouro_jax.data.tasks.rows.TASKS", {"mano": LongAnswers})
    root = build_task(tmp_path, TASK, [LENGTH])
    rows = open_source(root, "mano", "heldout", LENGTH)
    vocab_size = len(make_task(TASK).vocabulary)
    model, params = random_model(vocab_size)
    # Every token is as probable as any other, and the first of equals, 0, is taken.
    params = {**params, "lm_head": jax.tree.map(jnp.zeros_like, params["lm_head"])}
    (score,) = score_answers(model, params, rows, (1,))
    assert score.exact == pytest.approx(1 / 3) and score.token_accuracy == pytest.approx(1 / 2)
    assert score.nats == pytest.approx(2 * np.log(vocab_size), rel=1e-5)


@dataclasses.dataclass(frozen=True)
class AnyAnswer(Mano):
    """Takes any number for an answer."""

    def is_right(self, name, problem, answer):
        return len(answer) == 1 and 6 <= answer[0] < 6 + self.modulus


def test_answers_are_decoded_and_judged_where_many_are_right(opened):
    task, _, model, params = opened
    judged = AnyAnswer(max_length=2, modulus=3, heldout_problems=12)
    assert has_many_answers(judged, "mano") and not has_many_answers(task, "mano")
    (score,) = judge_answers(model, params, judged, "mano", (2,))
    prompts = [problem.tokens[:-1] for problem in judged.heldout("mano")]
    said = logits_of(model, params, prompts, 2).argmax(1)
    assert score.exact == pytest.approx(np.mean((said >= 6) & (said < 9)))
    assert score.loops == 2 and score.nats is None
