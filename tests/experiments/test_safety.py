"""The safety harness on harmless stand-ins: no harmful prompt is in this repository."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import reference

from ouro_jax.data.tokenizer import train_tokenizer
from ouro_jax.errors import ConfigError, RunError
from ouro_jax.experiments import safety, safety_judge
from ouro_jax.experiments.safety import Answering, Prompt, load_prompts, run_safety
from ouro_jax.experiments.safety_judge import KeywordStandIn, OpenAIJudge, Verdict, parse_score
from ouro_jax.experiments.safety_states import (
    last_token_states,
    load_questions,
    principal_coordinates,
    run_prompt_states,
    separation,
)
from ouro_jax.interop.huggingface import load_huggingface

TEXTS = ["How to bake bread?", "How to fold a kite, in paper?", "How to tune a lute?"]
PROMPTS = [Prompt(f"line/{n}", 0, text) for n, text in enumerate(TEXTS, start=1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Fields and tensors of a random model, what we load of them, and a tokenizer for it."""
    fields, tensors = reference.random_checkpoint(np.random.default_rng(5), vocab=270)
    folder = reference.write_checkpoint(tmp_path_factory.mktemp("model"), fields, tensors)
    tokenizer = train_tokenizer(TEXTS * 3, 262)
    return fields, tensors, *load_huggingface(folder), tokenizer


class Scripted:
    """A judge that replies from a list, and remembers what it was asked."""

    name, judges_harm = "scripted", False

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def __call__(self, prompt, answer):
        self.asked.append((prompt, answer))
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return Verdict(parse_score(reply), reply)


@pytest.fixture
def fake_answers(monkeypatch):
    """No model: answers name the depth and the prompt's length; lists the calls."""
    calls = []

    def answer(config, params, tokenizer, prompts, depth, mode, seed):
        calls.append((depth, len(prompts), seed))
        return [f"depth {depth}, {len(prompt.text)} characters" for prompt in prompts]

    monkeypatch.setattr(safety, "_answer", answer)
    monkeypatch.setattr(safety, "decoding_params", lambda config, params: params)
    return calls


def run(judge, output, **kwargs):
    settings = {"model_name": "m", "mode": "base", "depths": (1, 2), "say": lambda line: None}
    anything: tuple = (None, None, None)
    return run_safety(*anything, PROMPTS, judge, output, **settings | kwargs)


def test_prompts_as_the_data_set_ships(tmp_path):
    (tmp_path / "category_1.csv").write_text('one\n"two, quoted"\n\nthree, not quoted\n')
    (tmp_path / "category_11.csv").write_text("\ufefflast\n")
    prompts = load_prompts(tmp_path)
    assert [(p.id, p.category, p.text) for p in prompts] == [
        ("category_1/1", 1, "one"), ("category_1/2", 1, "two, quoted"),
        ("category_1/3", 1, "three, not quoted"), ("category_11/1", 11, "last"),
    ]  # fmt: skip


def test_prompts_from_jsonl(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "category": 4}\n\n{"prompt": "b"}\n')
    assert [(p.id, p.category, p.text) for p in load_prompts(file)] == [
        ("line/1", 4, "a"), ("line/3", 0, "b"),
    ]  # fmt: skip
    for wrong in ("x", "[]", '{"text": "a"}', '{"prompt": 3}'):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match="line 1: expected an object with the text `prompt`"):
            load_prompts(file)


def test_without_the_data_it_says_how_to_get_it(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="LLM-Tuning-Safety/HEx-PHI, accept its licence"):
            load_prompts(place)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("It refuses.\nScore: 1", 1), ("**Score: 5**\n", 5), ("score: 4.", 4),
        ("Score: 2\nno, rather\nScore: 3", 3), ("Score: 6", None), ("Score: 0", None),
        ("I would say 5", None), ("Score: 5/5", None), ("", None), ("a score: 5 it is", None),
    ],
)  # fmt: skip
def test_scores_are_read_from_replies(reply, score):
    assert parse_score(reply) == score


def test_scores_and_rates_by_depth(fake_answers, tmp_path):
    """Depth 1: 5, 1 and no score; depth 2: 5, 5, 2. Means and rates by hand."""
    replies = ["Score: 5", "Score: 1", "I cannot rate it", "Score: 5", "Score: 5", "Score: 2"]
    said, judge = [], Scripted(*replies)
    summary = run(judge, tmp_path / "s.jsonl", say=said.append)
    assert summary["by_depth"] == [
        {"depth": 1, "judged": 2, "unparsable": 1, "mean_score": 3.0, "harmful_rate": 0.5},
        {"depth": 2, "judged": 3, "unparsable": 0, "mean_score": 4.0, "harmful_rate": 2 / 3},
    ]
    assert "1 replies without a score" in said[-2]
    assert judge.asked[4] == (TEXTS[1], f"depth 2, {len(TEXTS[1])} characters")
    text = (tmp_path / "s.jsonl").read_text()
    assert not any(prompt in text for prompt in TEXTS)
    records = [json.loads(line) for line in text.splitlines()]
    assert records[0]["max_new_tokens"] == 128 and records[0]["judges_harm"] is False
    assert [r["reply"] for r in records if r["kind"] == "safety_score"] == replies
    assert records[-1] == {"kind": "safety_summary", "by_depth": summary["by_depth"]}


def test_a_run_that_was_cut_goes_on(fake_answers, tmp_path):
    output = tmp_path / "s.jsonl"
    with pytest.raises(RunError, match="gone"):
        run(Scripted("Score: 1", "no score", RunError("gone")), output)
    assert fake_answers == [(1, 3, 0)]
    judge = Scripted("Score: 2", "Score: 3", "Score: 4", "Score: 5")
    summary = run(judge, output)
    assert fake_answers == [(1, 3, 0), (2, 3, 0)], "what was answered is answered again"
    assert [prompt for prompt, _ in judge.asked] == [TEXTS[2], *TEXTS]
    assert [row["mean_score"] for row in summary["by_depth"]] == [1.5, 4.0]
    again = run(Scripted(), output)
    assert again["by_depth"] == summary["by_depth"] and len(fake_answers) == 2


def test_other_settings_need_another_file(fake_answers, tmp_path):
    run(KeywordStandIn("depth"), tmp_path / "s.jsonl")
    with pytest.raises(ConfigError, match="was begun with model = 'm', seed = 0, now 'n', 1: cho"):
        run(KeywordStandIn("depth"), tmp_path / "s.jsonl", model_name="n", seed=1)
    with pytest.raises(ConfigError, match="mode = 'thinkin': .* Did you mean 'thinking'?"):
        run(KeywordStandIn("depth"), tmp_path / "t.jsonl", mode="thinkin")


def test_the_paper_s_settings():
    assert safety.ANSWERING["base"] == Answering(0.0, 1.0, 128, False)
    assert safety.ANSWERING["thinking"] == Answering(1.0, 0.7, 8192, True)
    assert safety.DEPTHS == (1, 2, 3, 4, 5, 6, 7, 8)


def test_each_depth_answers_with_that_many_loops(model, tmp_path, monkeypatch):
    """Greedy answers of a real model, against the whole sequence recomputed in float64."""
    fields, tensors, config, params, tokenizer = model
    monkeypatch.setitem(safety.ANSWERING, "base", Answering(0.0, 1.0, 3, chat=False))
    output = tmp_path / "s.jsonl"
    run_safety(
        config, params, tokenizer, PROMPTS[:1], KeywordStandIn("x"), output, model_name="m",
        mode="base", depths=(1, 3), say=lambda line: None,
    )  # fmt: skip
    records = [json.loads(line) for line in output.open()]
    answers = {r["depth"]: r["answer"] for r in records if r["kind"] == "safety_answer"}
    for loops in (1, 3):
        ids = tokenizer.encode(TEXTS[0]).ids
        length = len(ids)
        for _ in range(3):
            out = reference.forward(fields, tensors, np.array([ids]), num_loops=loops)
            ids.append(int(out.logits_TBLV[-1, 0, -1].argmax()))
        assert answers[loops] == tokenizer.decode(ids[length:], skip_special_tokens=False)


@pytest.fixture
def endpoint(monkeypatch):
    """A chat endpoint on this machine: give it (status, body) pairs, and see what it was asked."""
    replies, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            size = int(self.headers["Content-Length"])
            asked.append((self.headers["Authorization"], json.loads(self.rfile.read(size))))
            status, body = replies.pop(0)
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(safety_judge.KEY_VARIABLE, "secret")
    monkeypatch.setattr(safety_judge, "RETRIES", 0)
    yield f"http://127.0.0.1:{server.server_port}/v1", replies, asked
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_in_openai_s_words(endpoint):
    url, replies, asked = endpoint
    said = {"role": "assistant", "content": "It complies.\nScore: 5"}
    choices = [{"index": 0, "finish_reason": "stop", "message": said}]
    completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "j"}
    replies.append((200, completion | {"choices": choices}))
    judge = OpenAIJudge("j", url)
    assert judge("the request", "the answer") == Verdict(5, said["content"])
    key, body = asked[0]
    assert key == "Bearer secret" and body["model"] == "j" and body["temperature"] == 0
    assert body["messages"][0]["content"] == safety_judge.RUBRIC
    assert "the request" in body["messages"][1]["content"]
    assert "the answer" in body["messages"][1]["content"]
    assert "secret" not in judge.name


def test_an_endpoint_that_fails_and_one_that_filters(endpoint):
    url, replies, _ = endpoint
    filtered = {"error": {"message": "filtered", "code": "content_filter", "type": "x"}}
    replies += [(400, filtered), (503, {"error": {"message": "busy"}})]
    judge = OpenAIJudge("j", url)
    assert judge("a", "b").score is None
    with pytest.raises(RunError, match="gave no answer: .*busy.* the same command goes on"):
        judge("a", "b")


def test_a_judge_without_a_key(monkeypatch):
    monkeypatch.delenv(safety_judge.KEY_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        OpenAIJudge("j")


def test_states_are_those_of_the_last_token(model):
    fields, tensors, config, params, _ = model
    prompts = [[5, 6, 7, 8], [9], list(range(20, 50))]
    states_TBD = last_token_states(config, params, prompts, depths=3)
    for row, prompt in enumerate(prompts):
        out = reference.forward(fields, tensors, np.array([prompt]), num_loops=3)
        np.testing.assert_allclose(states_TBD[:, row], out.states_TBLD[:, 0, -1], atol=1e-4)


def test_principal_coordinates_of_points_on_a_tilted_plane():
    """Variances 9 and 1 along known directions of a space of five; signs as documented."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(5, 2)))
    plane_B2 = np.array([(3, 1), (3, -1), (-3, 1), (-3, -1)], float)
    xy_B2, explained = principal_coordinates(plane_B2 @ basis.T + 7.0)
    signs = np.sign(basis[np.abs(basis).argmax(0), [0, 1]])
    np.testing.assert_allclose(xy_B2, plane_B2 * signs, atol=1e-12)
    assert explained == pytest.approx(1.0)


def test_separation_by_hand():
    states_BD = np.array([[0.0, 1], [0, -1], [6, 1], [6, -1]])
    assert separation(states_BD, np.array([False, False, True, True])) == pytest.approx(6.0)
    assert separation(states_BD, np.array([False, True, False, True])) == pytest.approx(2 / 3)


def test_states_of_two_lists(model, tmp_path):
    *_, config, params, tokenizer = model
    (tmp_path / "benign.txt").write_text("\n".join(TEXTS) + "\n\n")
    benign = load_questions(tmp_path / "benign.txt")
    assert benign == TEXTS
    output = tmp_path / "states.jsonl"
    summary = run_prompt_states(
        config, params, tokenizer, benign, ["lute", "kite"], output, model_name="m", chat=False,
        depths=2, say=lambda line: None,
    )  # fmt: skip
    records = [json.loads(line) for line in output.open()]
    states = [record for record in records if record["kind"] == "safety_state"]
    assert [state["label"] for state in states] == (["benign"] * 3 + ["harmful"] * 2) * 2
    assert set(summary["separation"]) == {1, 2} and "bread" not in output.read_text()
    (tmp_path / "one.txt").write_text("one\n")
    with pytest.raises(ConfigError, match="questions = 1: expected at least 2"):
        load_questions(tmp_path / "one.txt")
    with pytest.raises(ConfigError, match="no such file; expected a text file"):
        load_questions(tmp_path / "nowhere.txt")
