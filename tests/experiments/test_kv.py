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
    return heldout_prompts(heldout(), 9, 2)


@functools.cache
def answers():
    return generate(subject(1).config, subject(1).params, prompts(), NEW).tokens


def test_the_full_policy_is_exact_and_the_others_are_compared_with_it(tmp_path):
    references = [answers()[0][:2], [0] * NEW]
    path = tmp_path / "kv.jsonl"
    run = functools.partial(
        run_kv, subject(1), prompts(), path, NEW, policies=("full", "first"), references=references
    )
    records = run()
    by_policy = {record["kv"]: record for record in records}
    full = by_policy["full"]
    assert full["exact_match"] == 0.5  # the first one as far as it goes
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
    """Mean loss of the answers' tokens in numpy, from one row of logits each."""
    losses = []
    for prompt, answer in zip(prompts(), answers, strict=True):
        text = np.array([*prompt, *answer, *[0] * (NEW - len(answer))], np.int32)
        logp = log_softmax(np.asarray(_logits(text), np.float64))
        losses += [-logp[len(prompt) + i - 1, token] for i, token in enumerate(answer)]
    return np.mean(losses)


@jax.jit
def _logits(text_L):
    model, params = LoopLM(subject(1).config), {"params": subject(1).params}
    state_1LD = model.apply(params, text_L[None]).states_TBLD[-1]
    return model.apply(params, state_1LD[0], method="logits")


def test_answers_of_other_lengths_are_judged_without_their_padding():
    short = [answers()[0][:1], answers()[1]]
    assert nats_per_token(subject(1), prompts(), short) == pytest.approx(
        (judged([answers()[0][:1], []]) + NEW * judged([[], answers()[1]])) / (NEW + 1), rel=1e-5
    )
    assert nats_per_token(subject(1), prompts(), [[], []]) is None


def test_references_have_to_fit_the_prompts():
    with pytest.raises(ConfigError, match="references = 1: expected one for each of the 2"):
        run_kv(subject(1), prompts(), None, references=[[1]])
