"""What is said of KV policies, for answers that are known; the engine has tests of its own."""

import functools
import inspect

import jax
import numpy as np
import pytest
from studied import heldout, log_softmax, subject

from ouro_jax.errors import ConfigError
from ouro_jax.experiments import kv
from ouro_jax.experiments.scores import heldout_prompts
from ouro_jax.inference.generate import Generation, generate
from ouro_jax.model.loop_lm import LoopLM
from ouro_jax.reporting.kv import kv_table

NEW = 6


@functools.cache
def prompts():
    return heldout_prompts(heldout(), 9, 2)


ANSWERS = {"full": [[7, 8, 9, 1, 2, 3], [4, 4, 4]], "first": [[7, 8, 0, 1, 2, 3], [4, 4, 4]]}
DEPTHS = {"full": [[4] * 6, [4] * 3], "first": [[1] * 6, [4] * 3]}


@pytest.fixture
def calls(monkeypatch):
    """Known answers in place of the engine's, and the arguments it was asked with."""
    seen = []

    def answer(*arguments, **keywords):
        asked = inspect.signature(generate).bind(*arguments, **keywords).arguments
        seen.append(asked)
        return Generation(ANSWERS[asked["kv"]], DEPTHS[asked["kv"]])

    monkeypatch.setattr(kv, "generate", answer)
    return seen


def test_policies_are_compared_with_full_and_with_the_references(tmp_path, calls):
    run = functools.partial(
        kv.run_kv, subject(), prompts(), tmp_path / "kv.jsonl", NEW, policies=("full", "first")
    )
    full, first = run(references=[[7, 8], [4, 5]])  # of the first answer, only as much as there is
    assert (full["exact_match"], first["exact_match"]) == (0.5, 0.5)
    assert (full["equal_answers"], first["equal_answers"]) == (1, 0.5)
    assert (full["tokens_in_common"], first["tokens_in_common"]) == ((6 + 3) / 2, (2 + 3) / 2)
    assert (full["mean_depth"], first["mean_depth"]) == (4, (6 * 1 + 3 * 4) / 9)
    assert (full["memory"], first["memory"]) == (1, 0.25)
    assert (full["paper"], first["paper"]) == (kv.PAPER["full"], kv.PAPER["first"])
    for policy, record in (("full", full), ("first", first)):
        assert record["nats_per_token"] == pytest.approx(judged(ANSWERS[policy]), rel=1e-5)
    assert [asked["kv"] for asked in calls] == ["full", "first"]  # full only once
    assert kv_table([full, first]).row_count == 2

    said = []
    assert run(references=[[7, 8], [4, 5]], progress=said.append) == [full, first]
    assert all(line.endswith("found") for line in said) and len(calls) == 2
    # With stop tokens an answer has to end where the reference does, and under a rule of its own.
    full, first = run(references=[[7, 8], [4, 4, 4]], stop_ids=[0], exits=["q:0.5"])
    assert (full["exact_match"], first["exact_match"]) == (0.5, 0.5)
    assert calls[-1]["exit"] == "q:0.5" and calls[-1]["stop_ids"] == [0]
    full, _ = run()
    assert full["exact_match"] is None


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
    model, params = LoopLM(subject().config), {"params": subject().params}
    state_1LD = model.apply(params, text_L[None]).states_TBLD[-1]
    return model.apply(params, state_1LD[0], method="logits")


def test_no_answers_have_no_loss():
    assert kv.nats_per_token(subject(), prompts(), [[], []]) is None


def test_references_have_to_fit_the_prompts():
    with pytest.raises(ConfigError, match="references = 1: expected one for each of the 2"):
        kv.run_kv(subject(), prompts(), None, references=[[1]])
