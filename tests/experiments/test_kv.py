"""KV policies on greedy answers: against plain decoding by hand, and references that are known."""

import functools

import jax
import numpy as np
import pytest
from studied import heldout, log_softmax, subject

from ouro_jax.errors import ConfigError
from ouro_jax.experiments.kv import PAPER, nats_per_token, run_kv
from ouro_jax.experiments.scores import heldout_prompts
from ouro_jax.inference.generate import generate
from ouro_jax.model.loop_lm import LoopLM
from ouro_jax.reporting.kv import kv_table

pytestmark = pytest.mark.usefixtures("kept_programs")
NEW = 6


@functools.cache
def prompts():
    return heldout_prompts(heldout(), 9, 3)


@functools.cache
def answers():
    return generate(subject().config, subject().params, prompts(), NEW).tokens


def test_the_full_policy_is_exact_and_the_others_are_compared_with_it(tmp_path):
    references = [answers()[0], answers()[1][:2], [0] * NEW]
    path = tmp_path / "kv.jsonl"
    run = functools.partial(
        run_kv, subject(), prompts(), path, NEW, policies=("full", "first"), references=references
    )
    records = run()
    by_policy = {record["kv"]: record for record in records}
    full = by_policy["full"]
    assert full["exact_match"] == pytest.approx(2 / 3)  # the second one as far as it goes
    assert (full["equal_answers"], full["tokens_in_common"], full["mean_depth"]) == (1, NEW, 4)
    assert full["nats_per_token"] == pytest.approx(judged(answers()), rel=1e-5)
    assert by_policy["first"]["nats_per_token"] > full["nats_per_token"]
    assert by_policy["first"]["tokens_in_common"] < NEW
    assert {name: record["memory"] for name, record in by_policy.items()} == {
        "full": 1,
        "first": 0.25,
    }
    assert by_policy["first"]["paper"] == PAPER["first"]
    said = []
    assert run(progress=said.append) == records
    assert all(line.endswith("found") for line in said)
    assert kv_table(records).row_count == 2


def judged(answers):
    """Mean loss of the answers' tokens, each row by itself in numpy."""
    losses = []
    model, params = LoopLM(subject().config), {"params": subject().params}
    for prompt, answer in zip(prompts(), answers, strict=True):
        text = np.array([[*prompt, *answer]], np.int32)
        state = jax.jit(model.apply)(params, text).states_TBLD[-1, 0]
        logp = log_softmax(np.asarray(model.apply(params, state, method="logits"), np.float64))
        losses += [-logp[len(prompt) + i - 1, token] for i, token in enumerate(answer)]
    return np.mean(losses)


def test_answers_of_other_lengths_are_judged_without_their_padding():
    short = [answers()[0][:1], answers()[1], []]
    assert nats_per_token(subject(), prompts(), short) == pytest.approx(
        (judged([answers()[0][:1], [], []]) + NEW * judged([[], answers()[1], []])) / (NEW + 1),
        rel=1e-5,
    )
    assert nats_per_token(subject(), prompts(), [[], [], []]) is None


def test_references_have_to_fit_the_prompts():
    with pytest.raises(ConfigError, match="references = 1: expected one for each of the 3"):
        run_kv(subject(), prompts(), None, references=[[1]])
