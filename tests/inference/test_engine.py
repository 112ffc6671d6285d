"""The engine against decoding in float64 without batch, cache or compiler; joins and leaves."""

import jax
import numpy as np
import pytest
import reference
import slow_decode

from ouro_jax.errors import ConfigError
from ouro_jax.inference.engine import Engine
from ouro_jax.inference.requests import Request
from ouro_jax.interop.huggingface import load_huggingface
from ouro_jax.model.cache import KV_POLICIES

RULES = ["static:2", "q:0.6", "hidden:4.5", "confidence:0.3", "lookahead:0.6", None]
PROMPTS = [[5], [7, 1, 2, 3, 4, 70, 9, 11, 12], [30, 40, 50], [8, 8, 8, 61]]
LENGTHS = [9, 5, 12, 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Fields and tensors of a grouped-query model, and what we load of them."""
    fields, tensors = reference.random_checkpoint(
        np.random.default_rng(3), heads=4, kv_heads=2, head_dim=10, vocab=80
    )
    folder = reference.write_checkpoint(tmp_path_factory.mktemp("model"), fields, tensors)
    return fields, tensors, *load_huggingface(folder)


@pytest.fixture(scope="module")
def engines(model):
    """An engine of three slots of each policy, made when first asked for."""
    made = {}

    def get(kv):
        if kv not in made:
            made[kv] = Engine(*model[2:], kv=kv, slots=3, window=64)
        return made[kv]

    return get


def run(engine, requests, between=lambda step: None):
    """Tokens, depths and end of every request, by its index."""
    ids = {engine.submit(request): index for index, request in enumerate(requests)}
    answers = [([], []) for _ in requests]
    ends = [None] * len(requests)
    for step in range(10_000):
        if engine.idle:
            return answers, ends
        between(step)
        for update in engine.step():
            index = ids[update.request_id]
            assert ends[index] is None, "nothing comes after the end"
            if update.token:
                answers[index][0].append(update.token.token)
                answers[index][1].append(update.token.depth)
            ends[index] = update.finish
    raise AssertionError("the engine does not come to an end")


def slow(model, prompt, steps, kv, exit, loops=4):
    fields, tensors, *_ = model
    kind, _, value = (exit or f"static:{loops}").partition(":")
    rule = slow_decode.rule(kind, float(value))
    if kv == "full" and kind == "static":
        loops = int(value)
    return slow_decode.decode(fields, tensors, prompt, steps, kv, rule, loops)


@pytest.mark.parametrize("kv", KV_POLICIES)
def test_every_policy_and_rule_equals_slow_decoding(model, engines, kv):
    """Twenty-four ragged requests in three slots: each joins while others are in mid-token."""
    cases = [
        (prompt, length, exit)
        for exit in RULES
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
    ]
    requests = [Request(prompt, length, exit=exit) for prompt, length, exit in cases]
    answers, ends = run(engines(kv), requests)
    assert ends == ["length"] * len(cases)
    depths = {exit: set() for exit in RULES}
    for (prompt, length, exit), answer in zip(cases, answers, strict=True):
        assert answer == slow(model, prompt, length, kv, exit), (exit, prompt)
        depths[exit] |= set(answer[1])
    # A rule that always says the same would test nothing.
    assert all(len(depths[exit]) > 1 for exit in RULES if exit not in (None, "static:2"))


def test_policies_differ(model):
    """They are told apart by what they say, so that the tests above compare five things."""
    said = {kv: slow(model, PROMPTS[1], 12, kv, "q:0.6")[0] for kv in KV_POLICIES}
    assert len({tuple(tokens) for tokens in said.values()}) >= 4


@pytest.mark.parametrize("kv", ["exited", "mean"])
def test_fewer_loops_than_the_engine_has(model, engines, kv):
    requests = [Request(PROMPTS[1], 6, loops=loops) for loops in (1, 2, 3)]
    answers, _ = run(engines(kv), requests)
    for loops, answer in enumerate(answers, start=1):
        assert answer == slow(model, PROMPTS[1], 6, kv, None, loops)


def test_shared_policies_hold_one_set(engines):
    held = {kv: engines(kv)._cache.keys_CNRGSK.nbytes for kv in KV_POLICIES}
    assert held["full"] == held["exited"] == 4 * held["last"]
    assert held["last"] == held["first"] == held["mean"]


def test_early_exit_runs_fewer_loops_but_with_full(engines):
    """Steps of one request: the loops that its tokens ran, and one for the last report."""
    steps = {}
    for kv in ("full", "exited"):
        count = []
        run(engines(kv), [Request(PROMPTS[0], 9, exit="q:0.6")], count.append)
        steps[kv] = len(count)
    assert steps["full"] >= 4 * 8
    assert steps["exited"] < 0.8 * steps["full"]


@pytest.mark.parametrize("kv", ["full", "exited", "last"])
def test_a_conversation_goes_on_as_if_read_anew(model, engines, kv):
    engine = engines(kv)
    rng = np.random.default_rng(5)
    prompt = rng.integers(0, 80, 20).tolist()
    first = run(engine, [Request(prompt, 8, exit="q:0.6")])[0][0][0]
    # What the slot holds is not read again: 20 tokens, and with `full` the answer's but the last.
    longer = [*prompt, *first, 3, 1, 4]
    shared = max(engine._shared(slot, _waiting(engine, longer)) for slot in range(3))
    assert shared == {"full": 27, "exited": 20, "last": 0}[kv]
    answers, _ = run(engine, [Request(longer, 6, exit="q:0.6")])
    assert answers[0] == slow(model, longer, 6, kv, "q:0.6")
    # Another question to the same beginning.
    other = [*prompt[:18], 9, 9]
    answers, _ = run(engine, [Request(other, 6, exit="q:0.6")])
    assert answers[0] == slow(model, other, 6, kv, "q:0.6")


def _waiting(engine, prompt):
    engine.submit(Request(prompt, 6))
    answer = engine._waiting[-1]
    engine.cancel(answer.id)
    return answer


def test_a_long_prompt_is_read_in_pieces_beside_decoding(model):
    fields, tensors, config, params = model
    prompt = np.random.default_rng(0).integers(0, 80, 330).tolist()
    engine = Engine(config, params, kv="exited", slots=2, window=340)
    short = engine.submit(Request([5, 6], 10))
    engine.step()
    long = engine.submit(Request(prompt, 3, exit="q:0.6"))
    said, order = {short: [], long: []}, []
    while not engine.idle:
        for update in engine.step():
            said[update.request_id].append(update.token.token)
            order.append(update.request_id)
    assert order.index(long) > 0  # 256, 64 and 10 tokens of it: the short one went on meanwhile
    out = reference.forward(fields, tensors, np.array([prompt]))
    exit = int(reference.exit_step(out.gate_logits_TBL[:, 0, -1], 0.6))
    assert said[long][0] == int(out.logits_TBLV[exit, 0, -1].argmax())
    assert said[short] == slow(model, [5, 6], 10, "exited", None)[0]


def test_a_cancelled_request_leaves_no_trace(model, engines):
    engine = engines("exited")
    prompts = [PROMPTS[index % 4] for index in range(6)]
    ids = [engine.submit(Request(prompt, 12, exit="q:0.6")) for prompt in prompts]
    said = {request_id: [] for request_id in ids}
    for step in range(500):
        if step == 4:
            engine.cancel(ids[0])  # decoding
            engine.cancel(ids[5])  # waiting
            engine.cancel(12345)  # nobody's
        for update in engine.step():
            said[update.request_id].append(update.token.token)
        if engine.idle:
            break
    assert engine.live == engine.waiting == 0
    assert len(said[ids[0]]) < 12 and said[ids[5]] == []
    for index in (1, 2, 3, 4):
        assert said[ids[index]] == slow(model, prompts[index], 12, "exited", "q:0.6")[0]


def test_stop_ids_end_an_answer_before_them(model, engines):
    free, _ = slow(model, PROMPTS[2], 12, "exited", "q:0.6")
    stop = free[4]
    answers, ends = run(
        engines("exited"), [Request(PROMPTS[2], 12, exit="q:0.6", stop_ids=frozenset([stop]))]
    )
    assert answers[0][0] == free[: free.index(stop)] and ends == ["stop"]


def test_draws_do_not_depend_on_neighbours_or_slots(engines):
    engine = engines("exited")
    asked = [
        Request(PROMPTS[2], 10, temperature=1.0, top_p=0.9, seed=3, stream=stream, exit="q:0.6")
        for stream in range(5)
    ]
    together, _ = run(engine, asked)
    alone = [run(engine, [request])[0][0] for request in asked]
    assert together == alone
    assert len({tuple(tokens) for tokens, _ in together}) == 5


def test_what_is_told_of_a_token(model):
    fields, tensors, config, params = model
    engine = Engine(config, params, kv="exited", slots=1, window=64)
    prompt = PROMPTS[1]
    engine.submit(Request(prompt, 4, exit="q:0.6", alternatives=5, readouts=True))
    updates = []
    while not engine.idle:
        updates += engine.step()
    first = updates[0].token
    out = reference.forward(fields, tensors, np.array([prompt]))
    logits_TV, gates_T = out.logits_TBLV[:, 0, -1], out.gate_logits_TBL[:, 0, -1]
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    best = np.argsort(-logprobs_TV[first.depth - 1])[:5]
    assert [token for token, _ in first.alternatives] == best.tolist()
    expected = logprobs_TV[first.depth - 1, best]
    np.testing.assert_allclose([p for _, p in first.alternatives], expected, atol=1e-4)
    assert first.logprob == first.alternatives[0][1]
    assert [readout.token for readout in first.readouts] == logits_TV.argmax(-1).tolist()
    np.testing.assert_allclose(
        [readout.probability for readout in first.readouts], np.exp(logprobs_TV.max(-1)), atol=1e-4
    )
    np.testing.assert_allclose(
        [readout.exit_probability for readout in first.readouts],
        reference.exit_pdf(gates_T), atol=1e-5,
    )  # fmt: skip
    for update in updates[1:]:  # a token that left says nothing of the loops it did not run
        assert len(update.token.readouts) == update.token.depth
        assert update.token.readouts[-1].token == update.token.token


def test_nothing_is_compiled_again(engines):
    engine = engines("last")
    run(engine, [Request(PROMPTS[index % 4], 5, exit="q:0.6") for index in range(6)])
    with jax.log_compiles(), _no_compilation():
        run(engine, [
            Request([9] * 33, 4, 0.7, top_k=5, exit="confidence:0.2", stop_ids=frozenset([3])),
            Request([1, 2], 20, exit="hidden:3.0", alternatives=3, readouts=True),
        ])  # fmt: skip


class _no_compilation:
    def __enter__(self):
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, *_, **__):
        self._count += event.endswith("backend_compile_duration")

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)
        assert self._count == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(kv="frist"), "Did you mean 'first'"),
        (dict(slots=0), "slots = 0"),
        (dict(window=5000), "window = 5000: expected 1 to the model's 4,096"),
        (dict(loops=0), "loops = 0"),
    ],
)
def test_a_wrong_engine_is_refused(model, changes, message):
    with pytest.raises(ConfigError, match=message):
        Engine(model[2], {}, **changes)


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request([], 4), "the prompt is empty"),
        (Request([1] * 61, 4), "window of 64 positions"),
        (Request([80], 4), "token 80: expected 0 to 79"),
        (Request([1], 0), "max_new_tokens = 0"),
        (Request([1], 4, exit="q:1.5"), "q takes a probability from 0 to 1"),
        (Request([1], 4, exit="quiet:1"), "unknown exit rule"),
        (Request([1], 4, exit="static:5"), "at most the 4 loops"),
        (Request([1], 4, loops=5), "loops = 5: expected 1 to 4"),
        (Request([1], 4, temperature=float("nan")), "temperature = nan"),
        (Request([1], 4, top_p=0.0), "top_p = 0.0"),
        (Request([1], 4, alternatives=21), "alternatives = 21"),
    ],
)
def test_a_wrong_request_is_refused(engines, request_, message):
    with pytest.raises(ConfigError, match=message):
        engines("full").submit(request_)
