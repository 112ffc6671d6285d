"""`generate` against the published code's generations and a float64 full forward."""

import dataclasses
import json

import numpy as np
import pytest
import reference

from ouro_jax.errors import ConfigError
from ouro_jax.inference.generate import generate
from ouro_jax.interop.huggingface import load_huggingface


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Fields and tensors of a grouped-query model, and what we load of them."""
    fields, tensors = reference.random_checkpoint(
        np.random.default_rng(3), heads=4, kv_heads=2, head_dim=10, vocab=80
    )
    folder = reference.write_checkpoint(tmp_path_factory.mktemp("model"), fields, tensors)
    return fields, tensors, *load_huggingface(folder)


def full_forward_generation(fields, tensors, prompt, steps, exit_step, loops=None):
    """Greedy tokens and 0-based exit loops, the whole sequence recomputed for every token."""
    ids, exits = list(prompt), []
    for _ in range(steps):
        out = reference.forward(fields, tensors, np.array([ids]), num_loops=loops)
        exits.append(exit_step(out))
        ids.append(int(out.logits_TBLV[exits[-1], 0, -1].argmax()))
    return ids[len(prompt) :], exits


def q_rule(q):
    return lambda out: int(reference.exit_step(out.gate_logits_TBL[:, 0, -1], q))


def static_rule(depth):
    return lambda out: depth - 1


def hidden_rule(threshold):
    def step(out):
        states_TD = out.states_TBLD[:, 0, -1]
        moved = np.linalg.norm(np.diff(states_TD, axis=0), axis=-1) < threshold
        return int(moved.argmax()) + 1 if moved.any() else len(states_TD) - 1

    return step


def confidence_rule(threshold):
    def step(out):
        logits_TV = out.logits_TBLV[:, 0, -1]
        sure = np.exp(logits_TV - logits_TV.max(-1, keepdims=True)).sum(-1) ** -1 >= threshold
        return int(sure.argmax()) if sure.any() else len(sure) - 1

    return step


def lookahead_rule(q):
    """Leaves after loop t if, with gate t taken to be as gate t - 1, the sum would reach q."""

    def step(out):
        halt_T = 1 / (1 + np.exp(-out.gate_logits_TBL[:, 0, -1]))
        for loop in range(1, len(halt_T) - 1):
            if 1 - np.prod(1 - halt_T[:loop]) * (1 - halt_T[loop - 1]) >= q:
                return loop
        return len(halt_T) - 1

    return step


@pytest.mark.parametrize("threshold, published_rounding", [(1.0, False), (1.0, True), (0.5, False)])
def test_golden_generations(golden_dir, threshold, published_rounding):
    config, params = load_huggingface(golden_dir / "set_a")
    golden = json.loads((golden_dir / "set_a" / "generations.json").read_text())
    golden = [case for case in golden if case["exit_threshold"] == threshold]
    assert len(golden) == 3
    prompts = [case["prompt"] for case in golden]
    out = generate(
        config, params, prompts, 24, exit=f"q:{threshold}", published_rounding=published_rounding
    )
    assert out.tokens == [case["generated"] for case in golden]


@pytest.mark.parametrize(
    "exit, rule, loops",
    [
        (None, static_rule(4), None),
        (None, static_rule(6), 6),
        ("static:2", static_rule(2), None),
        ("q:0.6", q_rule(0.6), None),
        ("hidden:4.5", hidden_rule(4.5), None),
        ("confidence:0.3", confidence_rule(0.3), None),
        ("lookahead:0.6", lookahead_rule(0.6), None),
    ],
)
def test_ragged_decoding_equals_the_full_forward(model, exit, rule, loops):
    fields, tensors, config, params = model
    prompts = [[5], [7, 1, 2, 3, 4, 70, 9, 11, 12], [30, 40, 50]]
    out = generate(config, params, prompts, 12, exit=exit, loops=loops)
    seen = set()
    for row, prompt in enumerate(prompts):
        tokens, exits = full_forward_generation(fields, tensors, prompt, 12, rule, loops)
        assert out.tokens[row] == tokens
        assert out.depths[row] == [step + 1 for step in exits]
        seen |= set(exits)
    # A rule that always says the same would test nothing.
    assert len(seen) > 1 or exit in (None, "static:2")


def test_prompts_longer_than_a_chunk(model):
    fields, tensors, config, params = model
    rng = np.random.default_rng(0)
    # One token short of a chunk, at its end, and beyond it.
    prompts = [rng.integers(0, 80, length).tolist() for length in (511, 512, 530)]
    out = generate(config, params, prompts, 2, exit="q:0.6")
    for row, prompt in enumerate(prompts):
        expected = full_forward_generation(fields, tensors, prompt, 2, q_rule(0.6))
        assert (out.tokens[row], [d - 1 for d in out.depths[row]]) == expected


def test_numpy_prompts_and_one_new_token(model):
    *_, config, params = model
    prompt = np.array([3, 1, 4])
    assert generate(config, params, [prompt], 1).tokens == [
        generate(config, params, [prompt], 8).tokens[0][:1]
    ]


def test_stop_ids_end_a_row_and_leave_the_others(model):
    *_, config, params = model
    prompts = [[5], [7, 1, 2], [30, 40, 50]]
    free = generate(config, params, prompts, 16)
    stop = free.tokens[1][3]
    out = generate(config, params, prompts, 16, stop_ids=[stop])
    for row, tokens in enumerate(free.tokens):
        end = tokens.index(stop) if stop in tokens else len(tokens)
        assert out.tokens[row] == tokens[:end]
        assert out.depths[row] == free.depths[row][:end]
    # The very first token may be a stop token.
    assert generate(config, params, [[5]], 16, stop_ids=[free.tokens[0][0]]).tokens == [[]]


def test_streaming_shows_every_token_in_order(model):
    *_, config, params = model
    shown = [[], []]
    prompts = [[5], [7, 1, 2]]
    stop = generate(config, params, prompts, 8).tokens[0][2]
    out = generate(
        config, params, prompts, 8, stop_ids=[stop],
        on_token=lambda row, token, depth: shown[row].append((token, depth)),
    )  # fmt: skip
    expected = zip(out.tokens, out.depths, strict=True)
    assert shown == [list(zip(*row, strict=True)) for row in expected]


def test_more_prompts_than_slots_give_what_each_gives_alone(model, monkeypatch):
    *_, config, params = model
    monkeypatch.setattr("ouro_jax.inference.generate.MOST_SLOTS", 2)
    prompts = [[5], [7, 1, 2], [30, 40, 50], [9] * 20, [61, 2]]
    out = generate(config, params, prompts, 6, exit="q:0.6", kv="exited", temperature=0.8)
    monkeypatch.undo()
    assert out == generate(config, params, prompts, 6, exit="q:0.6", kv="exited", temperature=0.8)


def test_a_row_draws_the_same_alone_and_in_a_batch(model):
    *_, config, params = model
    draw = dict(temperature=1.0, top_p=0.9, top_k=40)
    prompts = [[5, 6, 7], [5, 6, 7], [9] * 20]
    batch = generate(config, params, prompts, 12, seed=1, **draw).tokens
    assert generate(config, params, prompts[:1], 12, seed=1, **draw).tokens == batch[:1]
    assert generate(config, params, prompts[:2], 12, seed=1, **draw).tokens == batch[:2]
    assert generate(config, params, prompts, 12, seed=1, **draw).tokens == batch
    # Equal prompts in different rows, and other seeds, draw differently.
    assert batch[0] != batch[1]
    assert generate(config, params, prompts, 12, seed=2, **draw).tokens != batch


def test_bfloat16_parameters_are_cast_once_and_decode(model):
    *_, config, params = model
    config = dataclasses.replace(config, dtype="bfloat16")
    out = generate(config, params, [[5, 6], [7]], 6)
    assert [len(tokens) for tokens in out.tokens] == [6, 6]


@pytest.mark.parametrize(
    "prompts, changes, message",
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 80]], {}, "token 80: expected 0 to 79"),
        ([[-1]], {}, "token -1"),
        ([[1] * 4000], dict(max_new_tokens=97), "window of 4,096"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens = 0"),
        ([[1]], dict(temperature=-0.1), "temperature = -0.1"),
        ([[1]], dict(temperature=float("nan")), "temperature = nan"),
        ([[1]], dict(top_p=0.0), "top_p = 0.0"),
        ([[1]], dict(top_p=1.1), "top_p = 1.1"),
        ([[1]], dict(top_k=-1), "top_k = -1"),
        ([[1]], dict(loops=0), "loops = 0"),
        ([[1]], dict(exit="q"), "--exit='q'"),
        ([[1]], dict(exit="quiet:0.5"), "unknown exit rule"),
        ([[1]], dict(exit="static:5"), "at most the 4 loops"),
        ([[1]], dict(kv="frist"), "Did you mean 'first'"),
        ([[1]], dict(exit="q:1.5"), "q takes a probability from 0 to 1"),
        ([[1]], dict(published_rounding=True), "published_rounding"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_compiled(model, prompts, changes, message):
    *_, config, _ = model
    with pytest.raises(ConfigError, match=message):
        # No parameters: they must not be needed to find the fault.
        generate(config, {}, prompts, **{"max_new_tokens": 4, **changes})
