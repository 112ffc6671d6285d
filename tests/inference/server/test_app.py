"""The server from the outside, on a fake engine: answers, streams, refusals, freed slots."""

import json
import socket
import threading
import time

import httpx
import openai
import pytest
from fake_engine import FakeEngine

from ouro_jax.data.tokenizer import encode
from ouro_jax.inference.server.app import Limits

CHAT = {"messages": [{"role": "user", "content": "the cat"}]}


def complete(client, **body):
    response = client.post("/v1/completions", json={"prompt": "the cat", "seed": 1} | body)
    assert response.status_code == 200, response.text
    return response.json()


def events(client, path, body):
    """The chunks of a stream, and whether it ended as it should."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    return chunks, lines[-1] == "[DONE]"


def openai_client(client, key="none"):
    return openai.OpenAI(base_url=str(client.base_url) + "/v1", api_key=key, max_retries=0)


def test_streams_say_what_whole_answers_say(client):
    for body in (
        {"max_tokens": 30, "n": 3, "stop": ["e", "at"], "logprobs": 2, "depths": True},
        {"max_tokens": 12, "prompt": ["the", "mat"], "temperature": 0},
        {"max_tokens": 12, "prompt": [[5, 6], [7]], "exit": "q:0.5", "kv": "full"},
    ):
        body = {"prompt": "the cat", "seed": 5} | body
        expected = complete(client, **body)
        chunks, done = events(client, "/v1/completions", body)
        assert done
        for choice in expected["choices"]:
            mine = [
                c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]
            ]
            assert "".join(c["text"] for c in mine) == choice["text"]
            assert mine[-1]["finish_reason"] == choice["finish_reason"]
            assert all(c["finish_reason"] is None for c in mine[:-1])
            if "logprobs" in body:
                told = [token for c in mine for token in c["logprobs"]["tokens"]]
                assert told == choice["logprobs"]["tokens"]
                offsets = [offset for c in mine for offset in c["logprobs"]["text_offset"]]
                assert offsets == choice["logprobs"]["text_offset"]
            if body.get("depths"):
                tokens = [token for c in mine for token in c["ouro"]["tokens"]]
                assert tokens == choice["ouro"]["tokens"]
                texts = [token["text"] for token in tokens]
                assert "".join(texts) == choice["text"]
                starts = [len("".join(texts[:place])) for place in range(len(texts))]
                assert choice["logprobs"]["text_offset"] == starts
                assert mine[-1]["ouro"]["mean_depth"] == choice["ouro"]["mean_depth"]


def test_choices_and_seeds(client):
    first = complete(client, n=3, max_tokens=9)
    texts = [choice["text"] for choice in first["choices"]]
    assert len(set(texts)) == 3
    assert [c["text"] for c in complete(client, n=3, max_tokens=9)["choices"]] == texts
    assert complete(client, max_tokens=9)["choices"][0]["text"] == texts[0]
    both = complete(client, n=3, max_tokens=9, prompt=["mat", "the cat"])["choices"]
    assert [choice["text"] for choice in both[3:]] == texts
    assert [choice["index"] for choice in both] == list(range(6))
    # A seed that the server chose is told, and gives the answer again.
    chosen = client.post("/v1/completions", json={"prompt": "the", "max_tokens": 9}).json()
    again = complete(client, prompt="the", max_tokens=9, seed=chosen["ouro"]["seed"])
    assert again["choices"] == chosen["choices"]


def test_usage_and_depths(client, tokenizer):
    out = complete(client, max_tokens=10, n=2, depths=True, loops=5, kv="full", exit="q:0.9")
    prompt = len(encode(tokenizer, "the cat"))
    assert out["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": 20, "total_tokens": prompt + 20,
    }  # fmt: skip
    assert out["ouro"] == {"kv": "full", "loops": 5, "exit": "q:0.9", "seed": 1}
    ouro = out["choices"][0]["ouro"]
    depths = [token["depth"] for token in ouro["tokens"]]
    assert ouro["mean_depth"] == sum(depths) / 10
    assert ouro["saved_share"] == pytest.approx(1 - sum(depths) / 10 / 5)
    assert all(len(token["readouts"]) == 5 for token in ouro["tokens"])
    assert set(ouro["tokens"][0]["readouts"][0]) == {
        "text", "id", "probability", "exit_probability",
    }  # fmt: skip
    assert "ouro" not in complete(client)["choices"][0]


def test_stop_strings_over_token_boundaries(serve, tokenizer, until_free):
    ids = [token for text in ("on", " t", "he ", "m", "at") for token in encode(tokenizer, text)]
    engine = FakeEngine(script=ids, slots=1)
    with serve(engine) as client:
        for stop, text in (
            ("the m", "on "),
            (["zebra", "e ma"], "on th"),
            ("on t", ""),
            (["aton", "maton the x"], "on the m"),
        ):
            body = {"prompt": "x", "max_tokens": 250, "stop": stop}
            out = complete(client, **body)["choices"][0]
            assert (out["text"], out["finish_reason"]) == (text, "stop")
            chunks, _ = events(client, "/v1/completions", body)
            shown = [c["text"] for chunk in chunks for c in chunk["choices"]]
            assert "".join(shown) == text
        # Nothing more is computed of an answer that has met one.
        until_free(client)
        assert len(engine.cancelled) == 8
        # Text that only might have been the start of a stop string comes at the end after all.
        out = complete(client, prompt="x", max_tokens=len(ids), stop="atom")["choices"][0]
        assert (out["text"], out["finish_reason"]) == ("on the mat", "length")


def test_the_official_client(client):
    api = openai_client(client)
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").id == "tiny"
    messages = [{"role": "user", "content": "the cat"}]
    whole = api.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=20, seed=3, logprobs=True,
        top_logprobs=2, extra_body={"depths": True, "exit": "q:0.5"},
    )  # fmt: skip
    choice = whole.choices[0]
    assert len(choice.logprobs.content) == 20 == whole.usage.completion_tokens
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert choice.ouro["mean_depth"] and whole.ouro["seed"] == 3
    stream = api.chat.completions.create(
        model="tiny", messages=messages, max_tokens=20, seed=3, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == choice.message.content
    assert chunks[-1].usage == whole.usage.model_copy() and not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason
    completion = api.completions.create(model="tiny", prompt="the", max_tokens=5, logprobs=1)
    assert len(completion.choices[0].logprobs.tokens) == 5
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        api.completions.create(model="big", prompt="the")
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(model="tiny", messages=messages, temperature=3)
    assert refused.value.param == "temperature"


@pytest.mark.parametrize(
    "path, body, param, words",
    [
        ("chat", CHAT | {"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        ("chat", CHAT | {"temperature": "hot"}, "temperature", 'temperature = "hot": expected a n'),
        ("chat", CHAT | {"n": 0}, "n", "n = 0: expected a whole number from 1 to 128"),
        ("chat", CHAT | {"n": True}, "n", "n = true"),
        ("chat", CHAT | {"kv": "ful"}, "kv", "Did you mean 'full'?"),
        ("chat", CHAT | {"loops": 5}, "loops", "1 to 4"),
        ("chat", CHAT | {"loops": 7, "kv": "full"}, "loops", "at most 6|from 1 to 6"),
        ("chat", CHAT | {"exit": "p:0.5"}, "exit", "unknown exit rule 'p'"),
        ("chat", CHAT | {"exit": "static:5"}, "exit", "at most the 4 loops"),
        ("chat", CHAT | {"stop": list("abcde")}, "stop", "a list of 1 to 4"),
        ("chat", CHAT | {"seed": -1}, "seed", "from 0 to"),
        ("chat", CHAT | {"top_logprobs": 2}, "top_logprobs", "logprobs = true"),
        ("chat", CHAT | {"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ("chat", CHAT | {"max_tokens": 500}, "messages", "window of 256"),
        ("chat", CHAT | {"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "the same"),
        ("chat", {}, "messages", "messages is missing"),
        ("chat", {"messages": []}, "messages", "a list of one or more"),
        ("chat", {"messages": [{"role": "usr", "content": "x"}]}, "messages[0].role", "'user'"),
        ("chat", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a text"),
        ("chat", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", ""),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ("", {"prompt": ""}, "prompt", "a text that is not empty"),
        ("", {"prompt": []}, "prompt", "a list of one or more"),
        ("", {"prompt": [1, "x"]}, "prompt", "a list"),
        ("", {"prompt": [999]}, "prompt", "the model's vocabulary"),
        ("", {"prompt": "x", "echo": True}, "echo", "one of false"),
        ("", {"prompt": "x", "frequency_penalty": 1}, "frequency_penalty", "one of 0"),
        ("", {"prompt": "x", "best_of": "two"}, "best_of", 'best_of = "two": expected one of 1'),
        ("", {"prompt": "x", "n": 100}, "n", "expected at most 72"),
        ("", {"prompt": "x", "top_p": 0}, "top_p", "more than 0"),
    ],
)
def test_wrong_fields_are_named(client, path, body, param, words):
    import re

    url = "/v1/chat/completions" if path else "/v1/completions"
    response = client.post(url, content=json.dumps(body), headers={"content-type":
                           "application/json"})  # fmt: skip
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert re.search(words, error["message"]) and error["code"], error


def test_everything_else_that_is_wrong_is_a_json_error_too(client):
    headers = {"content-type": "application/json"}
    url = "/v1/completions"
    deep = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for response, status, words in (
        (client.post(url, content=b"{", headers=headers), 400, "not JSON"),
        (client.post(url, content=b"\xff", headers=headers), 400, "not JSON"),
        (client.post(url, content=b'{"temperature": NaN}', headers=headers), 400, "not JSON"),
        (client.post(url, content=b"[1]", headers=headers), 400, "expected a JSON object"),
        (client.post(url, content=deep, headers=headers), 400, "not JSON"),
        (client.post(url, content=b'{"prompt": 1' + b"0" * 5000 + b"}", headers=headers), 400, ""),
        (client.post(url, content=b"{}"), 415, "application/json"),
        (client.get(url), 405, "expected POST"),
        (client.post("/health"), 405, "GET"),
        (client.get("/v2/completions"), 404, "/openapi.json"),
        (client.get("/v1/models/other"), 404, "expected 'tiny'"),
    ):
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert words in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_key_body_size_and_slow_bodies(serve):
    limits = Limits(max_body_bytes=1000, api_key="secret", timeout_seconds=0.3)
    with serve(FakeEngine(), limits=limits) as client:
        assert client.get("/health").status_code == client.get("/").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/other"):
            refused = client.get(path, headers={"authorization": "Bearer wrong"})
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["type"] == "authentication_error"
        client.headers["authorization"] = "Bearer secret"
        assert complete(client)["choices"]
        large = client.post("/v1/completions", json={"prompt": "x" * 2000})
        assert large.status_code == 413 and "1,000 bytes" in large.json()["error"]["message"]

        def parts(pause):
            yield b'{"prompt": "' + b"x" * 600
            time.sleep(pause)
            yield b"x" * 600

        json_type = {"content-type": "application/json"}
        # What is said to be too large is refused before any of it is sent.
        with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
                b"Content-Type: application/json\r\nContent-Length: 2000\r\n\r\n"
            )
            raw.settimeout(5)
            assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
        grown = client.post("/v1/completions", content=parts(0), headers=json_type)
        assert grown.status_code == 413
        slow = client.post("/v1/completions", content=parts(0.6), headers=json_type)
        assert slow.status_code == 408


def test_too_many_waiting(serve, until_free):
    with serve(FakeEngine(slots=1, seconds=0.02), limits=Limits(max_waiting=1)) as client:
        body = {"prompt": "x", "max_tokens": 200, "stream": True}
        with (
            client.stream("POST", "/v1/completions", json=body) as first,
            client.stream("POST", "/v1/completions", json=body) as second,
        ):
            assert first.status_code == second.status_code == 200
            third = client.post("/v1/completions", json=body)
            assert (third.status_code, third.headers["retry-after"]) == (429, "1")
            assert third.json()["error"]["type"] == "rate_limit_error"
        until_free(client)
        assert complete(client, max_tokens=1)


def test_a_client_that_leaves_frees_its_slots(serve, until_free):
    engine = FakeEngine(slots=2, seconds=0.01)
    with serve(engine) as client:
        body = {"prompt": "x", "max_tokens": 250, "n": 2}
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            next(response.iter_lines())
        until_free(client)
        assert len(engine.cancelled) == 2
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.1)
        until_free(client)
        assert len(engine.cancelled) == 4
        assert 'ouro_answers_total{reason="cancelled"} 4' in client.get("/metrics").text


def test_time_runs_out(serve, until_free):
    engine = FakeEngine(slots=1, seconds=0.02)
    with serve(engine, limits=Limits(timeout_seconds=0.2)) as client:
        late = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 200})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        chunks, done = events(client, "/v1/completions", {"prompt": "x", "max_tokens": 200})
        assert not done and chunks[0]["choices"] and chunks[-1]["error"]["code"] == "timeout"
        until_free(client)
        assert len(engine.cancelled) == 2


def test_an_engine_that_breaks_is_said_to_everyone(serve, until_free):
    engine = FakeEngine(slots=2, seconds=0.02)
    with serve(engine) as client:
        threading.Timer(0.1, lambda: setattr(engine, "broken", RuntimeError("HBM"))).start()
        chunks, done = events(client, "/v1/completions", {"prompt": "x", "max_tokens": 250})
        assert not done and chunks[-1]["error"]["code"] == "engine_failed"
        for response in (
            client.get("/health"),
            client.post("/v1/completions", json={"prompt": "x"}),
        ):
            assert response.status_code == 503
            assert response.json()["error"]["type"] == "server_error"


def test_metrics_and_health(client):
    complete(client, max_tokens=3)
    assert client.get("/health").json() == {"status": "ok", "model": "tiny"}
    text = client.get("/metrics").text
    for line in (
        'ouro_http_requests_total{route="/v1/completions",status="200"}',
        'ouro_slots{kv="exited"} 8',
        'ouro_slots_live{kv="full"} 0',
        'ouro_generated_tokens_total{depth="2"}',
        'ouro_first_token_seconds_bucket{le="+Inf"}',
    ):
        assert line in text
    policies = client.get("/v1/models").json()["data"][0]["ouro"]["kv"]
    assert policies["full"] == {"loops": 6, "window": 256, "slots": 8}
