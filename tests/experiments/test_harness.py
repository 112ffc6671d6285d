"""The model as lm-evaluation-harness sees it, against forwards and generations done by hand."""

import math
import runpy
import socket
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance  # noqa: E402

from ouro_jax.data.tokenizer import encode, train_tokenizer  # noqa: E402
from ouro_jax.errors import ConfigError  # noqa: E402
from ouro_jax.experiments import harness  # noqa: E402
from ouro_jax.experiments.benchmarks import Benchmark, find_benchmarks, run_benchmark  # noqa: E402
from ouro_jax.experiments.harness import HarnessLM  # noqa: E402
from ouro_jax.experiments.local_suite import docs_choices, equations, prose_texts  # noqa: E402
from ouro_jax.inference.generate import generate  # noqa: E402
from ouro_jax.interop.huggingface import load_huggingface  # noqa: E402
from ouro_jax.model.loop_lm import LoopLM  # noqa: E402

WORDS = "the cat sat on the mat: def cat(mat) returns the sat\n"


@pytest.fixture(scope="module")
def model(checkpoint):
    """Config, parameters and tokenizer of a model with random weights."""
    return checkpoint[2:]


@pytest.fixture(scope="module")
def by_hand(checkpoint):
    """ln p of a continuation by the model in numpy float64, over ids."""
    fields, tensors = checkpoint[:2]

    def log_probability(context, continuation, loops=None):
        row_1L = np.array([[*context, *continuation]])
        out = reference.forward(fields, tensors, row_1L[:, :-1], num_loops=loops)
        logits_LV = out.logits_TBLV[-1, 0, len(context) - 1 :]
        chosen = logits_LV[np.arange(len(continuation)), list(continuation)]
        return float((chosen - np.logaddexp.reduce(logits_LV, axis=-1)).sum())

    return log_probability


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Fields and tensors of a random model, what we load of them, and a tokenizer."""
    fields, tensors = reference.random_checkpoint(np.random.default_rng(2), layers=1, vocab=270)
    folder = reference.write_checkpoint(tmp_path_factory.mktemp("hf"), fields, tensors)
    return fields, tensors, *load_huggingface(folder), train_tokenizer([WORDS] * 20, 270)


def ask(lm, kind, *arguments):
    requests = [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("task", i, 1))
        for i, each in enumerate(arguments)
    ]
    return getattr(lm, kind)(requests, disable_tqdm=True)


def test_likelihoods_are_the_models_own(model, by_hand):
    config, params, tokenizer = model
    ends = [tokenizer.token_to_id("<|endoftext|>")]
    cases = {
        ("the cat", " sat on"): (encode(tokenizer, "the cat"), encode(tokenizer, " sat on")),
        # The space belongs to the word after it, wherever the task has put it.
        ("the cat ", "sat on"): (encode(tokenizer, "the cat"), encode(tokenizer, " sat on")),
        ("", "the mat"): (ends, encode(tokenizer, "the mat")),
    }
    found = ask(HarnessLM(*model, loops=2), "loglikelihood", *cases)
    for (logprob, greedy), (context, continuation) in zip(found, cases.values(), strict=True):
        assert logprob == pytest.approx(by_hand(context, continuation, 2), abs=1e-4)
        assert not greedy
    row_1L, loop_lm = jnp.array([context + continuation]), LoopLM(config)
    states_TBLD = loop_lm.apply({"params": params}, row_1L, num_loops=2).states_TBLD
    logits_LV = loop_lm.apply({"params": params}, states_TBLD[-1, 0], method="logits")
    logprobs_LV = jax.nn.log_softmax(logits_LV)[len(context) - 1 : -1]
    own = logprobs_LV[np.arange(len(continuation)), np.array(continuation)].sum()
    assert logprob == pytest.approx(float(own), abs=1e-4)


def test_a_rolling_likelihood_is_the_sum_over_windows(model, by_hand):
    *_, tokenizer = model
    ids = encode(tokenizer, WORDS)[:21]
    text = tokenizer.decode(ids)
    assert encode(tokenizer, text) == ids
    lm = HarnessLM(*model, window=8)
    whole, empty = ask(lm, "loglikelihood_rolling", (text,), ("",))
    ends = tokenizer.token_to_id("<|endoftext|>")
    expected = (
        by_hand([ends], ids[:8])
        + by_hand(ids[7:8], ids[8:16])
        # Five are left: the last window is filled up with what stands before them.
        + by_hand(ids[12:16], ids[16:])
    )
    assert whole == pytest.approx(expected, abs=1e-4) and empty == 0
    assert lm.take_mean_depth() == 4 and lm.take_mean_depth() is None


def test_answers_end_before_their_stop_strings(model):
    config, params, tokenizer = model
    contexts = ["the cat", "on", ""]
    ids = [encode(tokenizer, text) or [tokenizer.token_to_id("<|endoftext|>")] for text in contexts]
    out = generate(config, params, ids, 12, exit="q:0.6", kv="last", loops=2, stop_ids=[0])
    plain = [tokenizer.decode(tokens, skip_special_tokens=False) for tokens in out.tokens]
    lm = HarnessLM(*model, exit="q:0.6", kv="last", loops=2)
    assert ask(lm, "generate_until", *((text, {"max_gen_toks": 12}) for text in contexts)) == plain
    depths = [depth for row in out.depths for depth in row]
    assert lm.take_mean_depth() == pytest.approx(np.mean(depths))

    stop = plain[0][5:7]
    asked = {"until": [stop, ""], "max_gen_toks": 12, "do_sample": False, "temperature": 1.0}
    cut = ask(lm, "generate_until", *((text, asked) for text in contexts))
    assert cut == [text.split(stop)[0] for text in plain]
    sampled = {"max_gen_toks": 12, "do_sample": True, "temperature": 5.0}
    assert len(set(ask(lm, "generate_until", *[(contexts[0], sampled)] * 3))) > 1


def test_settings_out_of_range(model):
    for settings, error in (
        ({"loops": 0}, "loops = 0"),
        ({"loops": 2, "exit": "static:3"}, "at most the 2 loops"),
        ({"kv": "lost"}, "Did you mean 'last'"),
        ({"window": 5000}, "the model's 4,096"),
    ):
        with pytest.raises(ConfigError, match=error):
            HarnessLM(*model, **settings)
    with pytest.raises(ConfigError, match="max_gen_toks = 64"):
        ask(HarnessLM(*model, window=64), "generate_until", ("the", {"max_gen_toks": 64}))


def first_documents(documents, count):
    return [document for document, _ in zip(documents("heldout"), range(count), strict=False)]


def test_the_local_suite_end_to_end(model, by_hand, monkeypatch):
    """Accuracies and perplexities that `simple_evaluate` gives are those computed by hand."""

    def no_network(*_, **__):
        raise AssertionError("the local suite asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    config, params, tokenizer = model
    lm, count = HarnessLM(*model, loops=2, kv="last"), 3
    records = [run_benchmark(lm, benchmark, count) for benchmark in find_benchmarks(["local"])]
    for record in sum(records, []):
        assert record["n"] == count and record["loops"] == record["mean_depth"] == 2
        assert record["kv"] == ("last" if record["task"] == "local_arithmetic" else "full")
    docs, prose, arithmetic = (
        {record["metric"]: record["value"] for record in task} for task in records
    )
    right, right_by_length = [], []
    for document in first_documents(docs_choices, count):
        context = encode(tokenizer, document["text"].rstrip("\n"))
        logprobs = np.array([
            by_hand(context, encode(tokenizer, "\n" + choice), 2)
            for choice in document["choices"]
        ])  # fmt: skip
        lengths = np.array([len(choice) for choice in document["choices"]])
        right.append(logprobs.argmax() == document["label"])
        right_by_length.append((logprobs / lengths).argmax() == document["label"])
    assert docs == {"acc": np.mean(right), "acc_norm": np.mean(right_by_length)}

    texts = [document["text"] for document in first_documents(prose_texts, count)]
    nats = -sum(by_hand([0], encode(tokenizer, text), 2) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert prose["bits_per_byte"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)

    problems = first_documents(equations, count)
    prompts = [encode(tokenizer, document["problem"]) for document in problems]
    out = generate(config, params, prompts, 8, loops=2, kv="last", stop_ids=[0])
    given = [tokenizer.decode(tokens).split("\n")[0].strip() for tokens in out.tokens]
    rights = [text == document["answer"] for text, document in zip(given, problems, strict=True)]
    assert arithmetic == {"exact_match": np.mean(rights)}


def test_names_of_benchmarks(monkeypatch):
    class Index:
        all_tasks = ("arc_easy", "gsm8k")

    monkeypatch.setattr("ouro_jax.experiments.benchmarks._manager", Index)
    local = [benchmark.task for benchmark in find_benchmarks(["local"])]
    assert local == ["local_docs", "local_prose", "local_arithmetic"]
    assert find_benchmarks(["arc_easy"], 3) == [Benchmark("arc_easy", 3)]
    paper = {benchmark.task: benchmark.num_fewshot for benchmark in find_benchmarks(["paper"])}
    assert paper["mmlu"] == 5 and paper["gsm8k"] == 3 and paper["arc_challenge"] == 25
    for names, shots, error in (
        (["arc_eazy"], None, "unknown task 'arc_eazy'.*Did you mean 'arc_easy'"),
        (["locale"], None, "Did you mean 'local'"),
        (["paper"], 3, "num_fewshot = 3: expected unset with --tasks=paper"),
    ):
        with pytest.raises(ConfigError, match=error):
            find_benchmarks(names, shots)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.utils", None)
    with pytest.raises(ConfigError, match=r"pip install 'ouro_jax\[eval\]'"):
        runpy.run_path(harness.__file__)


def test_data_out_of_reach_is_named(model, monkeypatch):
    def refuse(path, **_):
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    config = {"task": "theirs", "dataset_path": "who/what", "output_type": "multiple_choice"}
    with pytest.raises(ConfigError, match="data set of theirs .* Couldn't reach 'who/what'"):
        run_benchmark(HarnessLM(*model), Benchmark("theirs", config=config), None)
