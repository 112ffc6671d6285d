"""The server on the real engine: what it answers is what the engine says alone."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference

from ouro_jax.data.tokenizer import encode
from ouro_jax.inference.engine import Engine
from ouro_jax.inference.requests import Request
from ouro_jax.inference.text import decode_text
from ouro_jax.interop.huggingface import load_huggingface


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Two slots on a model with random weights."""
    fields, tensors = reference.random_checkpoint(np.random.default_rng(0), vocab=270)
    folder = reference.write_checkpoint(tmp_path_factory.mktemp("hf"), fields, tensors)
    return Engine(*load_huggingface(folder), kv="exited", slots=2, window=64, widths=[2])


def alone(engine, tokenizer, prompt, seed, exit):
    """Text and depths of one answer, from the engine itself."""
    ids = tuple(encode(tokenizer, prompt))
    engine.submit(Request(ids, 12, 1.0, seed=seed, exit=exit, stop_ids=frozenset({0, 2})))
    tokens = []
    while not engine.idle:
        tokens += [update.token for update in engine.step() if update.token]
    ids = [token.token for token in tokens]
    return decode_text(tokenizer, ids), [token.depth for token in tokens]


def test_answers_together_are_those_of_each_alone(serve, engine, tokenizer, until_free):
    prompts = [("the cat", 1, "q:0.6"), ("mat", 2, None), ("on", 3, "static:2"), ("sat", 4, "q:0")]
    expected = [alone(engine, tokenizer, *prompt) for prompt in prompts]
    with serve(engine) as client:

        def ask(prompt):
            body = {
                "prompt": prompt[0], "seed": prompt[1], "exit": prompt[2], "max_tokens": 12,
                "depths": True, "logprobs": 2,
            }  # fmt: skip
            choice = client.post("/v1/completions", json=body).json()["choices"][0]
            tokens = choice["ouro"]["tokens"]
            assert all(1 <= len(token["readouts"]) <= 4 for token in tokens)
            assert all(-50 < logprob <= 0 for logprob in choice["logprobs"]["token_logprobs"])
            return choice["text"], [token["depth"] for token in tokens]

        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(ask, prompts)) == expected
        until_free(client)
