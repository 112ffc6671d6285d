"""Self-speculation: greedy answers of plain decoding, and the exact distribution of sampled ones.

V vocabulary; q a draft's distribution, p that of the last loop.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax.core import meta
from scipy import stats

from ouro_jax.config import ModelConfig
from ouro_jax.errors import ConfigError
from ouro_jax.inference import rounds
from ouro_jax.inference.generate import generate
from ouro_jax.inference.rounds import RoundProgram, play_round, read_prompts
from ouro_jax.inference.sampling import Sampling, row_keys
from ouro_jax.interop.huggingface import load_huggingface
from ouro_jax.model.loop_lm import LoopLM

PROMPTS = [[5], [7, 1, 2, 3, 4, 70, 9, 11, 12], [30, 40, 50]]
TINY = dict(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=7)
ROWS, TINY_PROMPT = 4096, [3, 1]


def load(folder, seed, window=4096, **shape):
    fields, tensors = reference.random_checkpoint(np.random.default_rng(seed), **shape)
    fields["max_position_embeddings"] = window
    return fields, tensors, *load_huggingface(reference.write_checkpoint(folder, fields, tensors))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Fields and tensors of a grouped-query model, and what we load of them."""
    folder = tmp_path_factory.mktemp("model")
    return load(folder, 3, heads=4, kv_heads=2, head_dim=10, vocab=80)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of seven tokens, whose answers of four tokens can be counted one by one."""
    # Four tokens and three drafts behind them just fit into the window.
    return load(tmp_path_factory.mktemp("tiny"), 8, window=len(TINY_PROMPT) + 7, **TINY)


# ---- greedy: the same answer ----


@pytest.mark.parametrize("speculate, loops", [("1x4", None), ("2x3", None), ("5x1", 6)])
def test_greedy_answers_are_those_of_plain_decoding(model, speculate, loops):
    *_, config, params = model
    plain = generate(config, params, PROMPTS, 40, loops=loops)
    out = generate(config, params, PROMPTS, 40, loops=loops, speculate=speculate)
    assert (out.tokens, out.depths) == (plain.tokens, plain.depths)
    assert plain.acceptance is None and out.acceptance is not None
    # Rounds with refused drafts, and more tokens than rounds: both paths were taken.
    assert 0 < out.acceptance.accepted < out.acceptance.judged
    assert out.acceptance.rounds < out.acceptance.tokens == 3 * 39


def test_prompts_longer_than_a_chunk(model):
    fields, tensors, config, params = model
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 80, length).tolist() for length in (512, 530, 3)]
    out = generate(config, params, prompts, 3, speculate="2x3")
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        text = np.array([prompt + tokens[:-1]])
        logits_LV = reference.forward(fields, tensors, text).logits_TBLV[-1, 0]
        assert tokens == logits_LV[len(prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
def test_answers_end_at_any_place_of_a_round(model, max_new_tokens):
    *_, config, params = model
    out = generate(config, params, PROMPTS, max_new_tokens, speculate="2x3")
    assert out.tokens == generate(config, params, PROMPTS, max_new_tokens).tokens
    assert max_new_tokens > 1 or (out.acceptance.rate, out.acceptance.rounds) == (None, 0)


def test_stop_ids_end_a_row_and_leave_the_others(model):
    *_, config, params = model
    free = generate(config, params, PROMPTS, 24).tokens
    for stop in (free[1][3], free[2][4], free[0][0]):
        plain = generate(config, params, PROMPTS, 24, stop_ids=[stop])
        out = generate(config, params, PROMPTS, 24, stop_ids=[stop], speculate="2x3")
        assert (out.tokens, out.depths) == (plain.tokens, plain.depths)
        assert any(len(tokens) < 24 for tokens in out.tokens)


def test_streaming_shows_every_token_in_order(model):
    *_, config, params = model
    stop = generate(config, params, PROMPTS, 24).tokens[1][6]
    shown = [[] for _ in PROMPTS]
    out = generate(
        config, params, PROMPTS, 24, stop_ids=[stop], speculate="2x3",
        on_token=lambda row, token, depth: shown[row].append((token, depth)),
    )  # fmt: skip
    assert shown == [[(token, 4) for token in tokens] for tokens in out.tokens]
    assert max(map(len, shown)) > 6


def test_drafts_of_a_model_whose_loops_change_nothing_are_all_right(model, tmp_path):
    """Output norms of zero: every layer adds nothing, and a norm of a normed state leaves it."""
    fields, tensors, *_ = model
    tensors = {name: x * ("layernorm_2" not in name) for name, x in tensors.items()}
    tensors["model.norm.weight"] = np.ones(32, np.float32)
    config, params = load_huggingface(reference.write_checkpoint(tmp_path, fields, tensors))
    for draws in ({}, dict(temperature=1.0, seed=4)):
        out = generate(config, params, PROMPTS, 41, speculate="2x3", **draws)
        assert (out.acceptance.rate, out.acceptance.tokens_per_round) == (1, 4)


# ---- sampling: the same distribution ----


def exact(fields, tensors, temperature, top_p, top_k):
    """P(t1, t2, t3, t4) after the prompt, shape [V, V, V, V], in float64."""
    vocab = fields["vocab_size"]
    texts = np.array([(*TINY_PROMPT, *t) for t in itertools.product(range(vocab), repeat=3)])
    logits_XLV = reference.forward(fields, tensors, texts).logits_TBLV[-1] / temperature
    joint = np.ones((vocab,) * 4)
    for place in range(4):
        p_XV = limited(logits_XLV[:, len(TINY_PROMPT) - 1 + place], top_p, top_k)
        # Equal for all continuations of the tokens before: any one of them will do.
        p = p_XV.reshape(vocab, vocab, vocab, vocab)
        p = p[(slice(None),) * place + (0,) * (3 - place)]
        joint = joint * p.reshape(p.shape + (1,) * (3 - place))
    return joint


def limited(logits_XV, top_p, top_k):
    """Softmax over the top_k largest and of these the fewest that reach top_p."""
    p_XV = np.exp(logits_XV - logits_XV.max(-1, keepdims=True))
    order_XV = np.argsort(-p_XV, axis=-1)
    for p_V, order_V in zip(p_XV, order_XV, strict=True):
        p_V[order_V[top_k or len(p_V) :]] = 0
        p_V /= p_V.sum()
        before_V = np.cumsum(p_V[order_V]) - p_V[order_V]
        p_V[order_V[before_V >= top_p]] = 0
        p_V /= p_V.sum()
    return p_XV


def p_values(answers_X4, joint):
    """Chi-square p values of t1, t2, (t1, t2), (t2, t3) and (t3, t4) against their joint."""
    vocab, found = joint.shape[0], []
    for places in ((0,), (1,), (0, 1), (1, 2), (2, 3)):
        others = tuple(set(range(4)) - set(places))
        expected = joint.sum(axis=others).ravel() * len(answers_X4)
        cells = np.ravel_multi_index(answers_X4[:, places].T, (vocab,) * len(places))
        seen = np.bincount(cells, minlength=expected.size)
        assert not seen[expected == 0].any()
        # Cells too small for the test are one.
        small = expected < 5
        groups = np.where(small, -1, np.arange(expected.size))
        pairs = [
            (seen[groups == group].sum(), expected[groups == group].sum())
            for group in np.unique(groups)
            if expected[groups == group].sum() > 0
        ]
        observed, mean = np.array(pairs, float).T
        found.append(stats.chisquare(observed, mean).pvalue)
    return found


def sampled(tiny, speculate, seed, temperature, top_p=1.0, top_k=0):
    """Four tokens of thousands of rows, their exact distribution, and how the drafts fared."""
    fields, tensors, config, params = tiny
    out = generate(
        config, params, [TINY_PROMPT] * ROWS, 4, speculate=speculate, seed=seed,
        temperature=temperature, top_p=top_p, top_k=top_k,
    )  # fmt: skip
    answers_X4 = np.array(out.tokens)
    return answers_X4, exact(fields, tensors, temperature, top_p, top_k), out.acceptance


@pytest.mark.parametrize(
    "speculate, draw",
    [
        ("2x3", dict(temperature=1.0)),
        ("2x3", dict(temperature=0.7, top_p=0.8)),
        ("1x2", dict(temperature=1.6, top_k=4)),
    ],
)
def test_sampled_answers_have_the_distribution_of_the_last_loop(tiny, speculate, draw):
    answers_X4, joint, acceptance = sampled(tiny, speculate, seed=11, **draw)
    assert 0.2 < acceptance.rate < 0.95
    assert min(p_values(answers_X4, joint)) > 1e-3


def accept_without_residual(p_BV, q_BV):
    return p_BV


def accept_always(p_BNV, q_BNV, drafts_BN, keys_B):
    full_B = jnp.full(drafts_BN.shape[0], drafts_BN.shape[1] - 1)
    return full_B, rounds._draw(p_BNV[:, -1], keys_B, 1)


@pytest.mark.parametrize(
    "name, broken", [("residual", accept_without_residual), ("judge", accept_always)]
)
def test_the_chi_square_sees_a_wrong_rule(tiny, monkeypatch, name, broken):
    monkeypatch.setattr(rounds, name, broken)
    play_round.clear_cache()
    answers_X4, joint, _ = sampled(tiny, "2x3", seed=11, temperature=1.0)
    play_round.clear_cache()
    assert min(p_values(answers_X4, joint)) < 1e-9


def test_a_row_draws_the_same_alone_and_in_a_batch(model):
    *_, config, params = model
    draw = dict(temperature=1.0, top_p=0.9, top_k=40, speculate="2x3")
    batch = generate(config, params, PROMPTS, 12, seed=1, **draw).tokens
    assert generate(config, params, PROMPTS[:1], 12, seed=1, **draw).tokens == batch[:1]
    assert generate(config, params, PROMPTS, 12, seed=2, **draw).tokens != batch


# ---- the cache stays where it lies ----

# Operations that pass an array on without touching its elements, or write a slice in place.
IN_PLACE = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "dynamic-update-slice"}


def whole_copies(text, shape):
    """Instructions of HLO that make a whole array of `shape` other than in place."""
    roots = dict(
        re.findall(r"^%(\S+) \([^\n]*\{\n(?:(?!^\}).*\n)*?  ROOT ([^\n]*)\n\}", text, re.M)
    )
    fused = set(re.findall(r"fusion\(.*?calls=%(\S+?)[,\s]", text))
    found, computation = [], ""
    for line in text.splitlines():
        if line.endswith("{"):
            computation = line.removeprefix("ENTRY ").removeprefix("%").split(" ")[0]
        made = re.search(rf"= \w+\[{shape}\]\S* ([\w-]+)\(", line)
        if not made or computation in fused or made[1] in IN_PLACE:
            continue
        called = re.search(r"calls=%(\S+?)[,\s]", line)
        if not (made[1] == "fusion" and called and " dynamic-update-slice(" in roots[called[1]]):
            found.append(line.strip())
    return found


def round_arguments(dtype, batch):
    """Shapes of all that `play_round` takes, for a grouped-query model of three layers."""
    config = ModelConfig(64, 32, 48, 3, 4, 2, 8, num_loops=4, dtype=dtype)
    program = RoundProgram(config, 4, 2, 3, 128)
    init = jax.eval_shape(LoopLM(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), meta.unbox(init)["params"]
    )
    sampling = Sampling(jnp.zeros(batch), jnp.zeros(batch, jnp.int32), jnp.ones(batch))
    ones_B = jnp.ones(batch, jnp.int32)
    inputs = (jnp.zeros((batch, 64), jnp.int32), ones_B, ones_B, row_keys(0, batch))
    cache, rows = jax.eval_shape(
        lambda params: read_prompts(config, 4, 128, params, *inputs, sampling), params
    )
    return program, params, cache, rows, jax.eval_shape(lambda: sampling)


def test_a_round_never_copies_the_cache():
    arguments = round_arguments("bfloat16", batch=8)
    cache = arguments[2]
    compiled = play_round.lower(*arguments).compile()
    shape = ",".join(map(str, jax.tree.leaves(cache)[0].shape))
    assert whole_copies(compiled.as_text(), shape) == []
    assert compiled.memory_analysis().alias_size_in_bytes == sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)
    )
    # The check sees the copy of a cache that is not given up.
    kept = jax.jit(play_round.__wrapped__, static_argnames="program")
    assert whole_copies(kept.lower(*arguments).compile().as_text(), shape) != []


# ---- what is refused ----


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(speculate="0x3"), "speculate = '0x3': expected drafts of 1 to 3 loops"),
        (dict(speculate="4x3"), "drafts of 1 to 3 loops, fewer than the 4"),
        (dict(speculate="2x3", loops=2), "drafts of 1 to 1 loops"),
        (dict(speculate="1x3", loops=1), "1 loop is run"),
        (dict(speculate="2x0"), "at least 1 draft"),
        (dict(speculate="2,3"), "'2,3': expected SxM, .* Did you mean 2x3"),
        (dict(speculate="2X3"), "Did you mean 2x3"),
        (dict(speculate="two"), "expected SxM"),
        (dict(speculate=""), "expected SxM"),
        (dict(exit="q:0.8"), "exit = 'q:0.8': expected none with speculate"),
        (dict(kv="last"), "kv = 'last': expected full with speculate"),
        (dict(published_rounding=True), "published_rounding = True"),
        (dict(loops=0), "loops = 0"),
        (dict(prompts=[]), "at least one prompt"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1, 80]]), "token 80"),
        (dict(prompts=[[1] * 4090]), "3 drafts behind the last one .* window of 4,096"),
        (dict(max_new_tokens=0), "max_new_tokens = 0"),
        (dict(temperature=-1.0), "temperature = -1"),
        (dict(top_p=0.0), "top_p = 0"),
        (dict(top_k=-1), "top_k = -1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_compiled(model, changes, message):
    *_, config, _ = model
    settings = dict(prompts=[[1]], max_new_tokens=4, speculate="2x3") | changes
    with pytest.raises(ConfigError, match=message):
        # No parameters: they must not be needed to find the fault.
        generate(config, {}, **settings)


def test_drafts_may_not_take_a_position_beyond_the_window(tiny):
    """The sampled answers above take the last one."""
    *_, config, params = tiny
    with pytest.raises(ConfigError, match="3 drafts behind the last one .* window of 9"):
        generate(config, params, [TINY_PROMPT], 5, speculate="2x3")
