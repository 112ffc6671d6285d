"""The thread that drives the engines, without HTTP; and the texts of answers, without a thread."""

import queue

import pytest
from fake_engine import FakeEngine

from ouro_jax.data.tokenizer import encode
from ouro_jax.errors import ConfigError
from ouro_jax.inference.requests import NewToken, Request
from ouro_jax.inference.server.answer import Answer
from ouro_jax.inference.server.worker import Worker


@pytest.fixture
def worker():
    """A started worker with two engines; ended after the test."""
    worker = Worker({"a": FakeEngine("a"), "b": FakeEngine("b", slots=1, seconds=0.01)})
    worker.start()
    yield worker
    worker.close()


def heard(news: queue.Queue) -> list:
    """Everything until the end of the request."""
    updates = [news.get(timeout=5)]
    while updates[-1].finish is None:
        updates.append(news.get(timeout=5))
    return updates


def test_both_engines_advance_together(worker):
    slow, fast = queue.Queue(), queue.Queue()
    worker.submit("b", Request((1,), 100), slow.put)
    worker.submit("a", Request((1,), 5), fast.put)
    assert len(heard(fast)) == 5 and slow.qsize() < 100
    assert len(heard(slow)) == 100


def test_a_request_that_cannot_be_answered_is_told_alone(worker):
    wrong, right = queue.Queue(), queue.Queue()
    worker.submit("a", Request((), 5), wrong.put)
    worker.submit("a", Request((1,), 5), right.put)
    assert isinstance(wrong.get(timeout=5), ConfigError)
    assert len(heard(right)) == 5 and worker.failure is None


def test_cancelled_requests_are_not_heard_of_again(worker):
    first, second = queue.Queue(), queue.Queue()
    ticket = worker.submit("b", Request((1,), 200), first.put)
    waiting = worker.submit("b", Request((2,), 200), second.put)
    first.get(timeout=5)
    worker.cancel(ticket)
    worker.cancel(waiting)
    third = queue.Queue()
    done = worker.submit("b", Request((3,), 2), third.put)
    assert len(heard(third)) == 2
    worker.cancel(done)  # too late, which is no error
    assert len(heard_again(worker)) == 1 and second.empty()


def heard_again(worker):
    """Asks for one token more, to see that the thread lives."""
    news = queue.Queue()
    worker.submit("a", Request((1,), 1), news.put)
    return heard(news)


def test_a_broken_engine_is_told_to_all_and_to_the_owner():
    engine, failures, news = FakeEngine(seconds=0.01), [], queue.Queue()
    worker = Worker({"a": engine}, failures.append)
    worker.start()
    worker.submit("a", Request((1,), 200), news.put)
    news.get(timeout=5)
    engine.broken = RuntimeError("out of memory")
    told = news.get(timeout=5)
    while not isinstance(told, RuntimeError):
        told = news.get(timeout=5)
    worker.submit("a", Request((1,), 2), news.put)
    assert news.get(timeout=5) is told
    worker.close()
    assert failures == [told]


def pieces_of(tokenizer, text, stops=()):
    answer = Answer(tokenizer, stops)
    told = []
    for token in text if isinstance(text, list) else encode(tokenizer, text):
        told.append([piece.text for piece in answer.push(NewToken(token, 1, 0.0))])
        if answer.stopped:
            return told
    return [*told, [piece.text for piece in answer.finish()]]


def test_half_characters_wait_and_every_token_comes_out(tokenizer):
    ids = encode(tokenizer, "é🐈")
    assert len(ids) == 6
    told = pieces_of(tokenizer, ids)
    assert told == [[], ["", "é"], [], [], [], ["", "", "", "🐈"], []]
    assert pieces_of(tokenizer, ids[:1]) == [[], ["\N{REPLACEMENT CHARACTER}"]]
    assert pieces_of(tokenizer, ids[:5])[-1] == ["", "", "\N{REPLACEMENT CHARACTER}"]


def test_what_may_be_a_stop_string_waits(tokenizer):
    ids = [tokenizer.token_to_id(letter) for letter in "xabacabad"]
    assert pieces_of(tokenizer, ids, ["abad"]) == [["x"], [], [], [], ["a", "b", "a", "c"], [], [],
                                                   [], []]  # fmt: skip
    assert pieces_of(tokenizer, ids[:4], ["abad"]) == [["x"], [], [], [], ["a", "b", "a"]]
    # The same text comes out whatever the stop strings are, up to the first of them.
    for stops in (["ca"], ["zz", "c"], ["xab"], ["bac", "ad"]):
        text = "".join(piece for told in pieces_of(tokenizer, ids, stops) for piece in told)
        assert text == "xabacabad"[: min(i for s in stops if (i := "xabacabad".find(s)) >= 0)]


def test_a_piece_is_cut_where_a_stop_string_begins(tokenizer):
    (the,) = encode(tokenizer, " the")
    assert pieces_of(tokenizer, [the], ["he"]) == [[" t"]]
    assert pieces_of(tokenizer, [the], [" "]) == [[]]
