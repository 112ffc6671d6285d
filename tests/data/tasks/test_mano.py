"""Mano's problems against a separate evaluator and the stated distributions."""

import collections

import numpy as np
import pytest

from ouro_jax.data.tasks.mano import Mano, answer_distribution, draw, evaluate
from ouro_jax.errors import ConfigError

SMALL = Mano(max_length=4, modulus=5, loss_on="answer", other_lengths=(3, 6))


def words_of(task, document):
    names = {number: word for word, number in task.vocabulary.items()}
    return [names[token] for token in document.tokens.tolist()]


def infix(words):
    """The prefix expression as Python would write it, read from its end with a stack."""
    stack = []
    for word in reversed(words):
        if word in "+-*":
            stack.append(f"({stack.pop()} {word} {stack.pop()})")
        else:
            stack.append(word)
    (text,) = stack
    return text


def training_problems(task, source="mano", rows=300, sequence_length=20):
    return [
        words_of(task, document)
        for index in range(rows)
        for document in task.documents(source, index, sequence_length)
    ]


def test_answers_are_those_of_a_separate_evaluator():
    for task in (SMALL, Mano(max_length=10, modulus=23)):
        for words in training_problems(task, sequence_length=task.longest()):
            bos, label, *expression, ans, answer = words
            assert (bos, ans) == ("<bos>", "<ans>")
            assert label == f"<len_{sum(word in '+-*' for word in expression)}>"
            assert int(answer) == eval(infix(expression)) % task.modulus


def test_minus_takes_the_operands_in_their_order():
    # The paper's example text has a slip; Physics of Language Models 4.1: + * a b - c d.
    assert evaluate("+ * 3 4 - 1 2".split(), 23) == (3 * 4 + (1 - 2)) % 23
    assert evaluate("- 1 2".split(), 23) == 22


def test_rows_are_pairs_of_lengths_without_padding():
    lengths = collections.Counter()
    for index in range(2000):
        documents = SMALL.documents("mano", index, 20)
        assert sum(len(document.tokens) for document in documents) == 20
        pair = [(len(document.tokens) - 5) // 2 for document in documents]
        assert sum(pair) == 5
        lengths.update(pair)
    assert all(abs(lengths[length] - 1000) < 4 * np.sqrt(1000) for length in range(1, 5))
    paper = Mano(max_length=10).documents("mano", 0, 1024)
    assert sum(len(document.tokens) for document in paper) == 1024


def test_sizes_of_the_left_operand_are_uniform():
    task, counts = Mano(max_length=4), collections.Counter()
    rng = task.random("sizes")
    for _ in range(4000):
        words = draw(rng, 4, 23)
        depth, size = 1, 0  # reads the left operand, behind the first operation
        for word in words[1:]:
            operation = word in "+-*"
            size += operation
            depth += 1 if operation else -1
            if depth == 0:
                break
        counts[size] += 1
    assert all(abs(counts[size] - 1000) < 4 * np.sqrt(750) for size in range(4))


@pytest.mark.parametrize(("length", "stated"), [(10, 0.0707), (16, 0.0716), (24, 0.0728)])
def test_chance_is_the_share_of_answer_zero(length, stated):
    exact = answer_distribution(length, 23)
    assert exact.sum() == pytest.approx(1) and exact.argmax() == 0
    # The stated shares are of 100,000 samples each.
    assert abs(exact[0] - stated) < 3 * np.sqrt(stated * (1 - stated) / 1e5)
    rng = Mano(max_length=length).random("chance")
    drawn = np.mean([evaluate(draw(rng, length, 23), 23) == 0 for _ in range(20_000)])
    assert abs(exact[0] - drawn) < 4 * np.sqrt(exact[0] / 20_000)
    assert Mano(max_length=4, modulus=5).chance("mano") == pytest.approx(0.2804, abs=1e-4)


def test_held_out_problems_never_occur_in_training():
    heldout = {" ".join(words_of(SMALL, document)) for document in SMALL.heldout("mano")}
    assert len(heldout) == SMALL.heldout_problems
    trained = {" ".join(words) for words in training_problems(SMALL, rows=20_000)}
    longest = {text for text in trained if "<len_4>" in text}
    assert len(longest) > 9_000 and not longest & heldout


def test_loss_masks_mark_the_answer():
    for document in SMALL.documents("mano", 3, 20) + SMALL.heldout("length_6")[:3]:
        assert document.loss_mask is not None
        assert document.loss_mask.tolist() == [False] * (len(document.tokens) - 1) + [True]
    assert Mano().documents("mano", 3, 1024)[0].loss_mask is None


def test_other_lengths_have_their_operations_and_a_known_label():
    for words in (words_of(SMALL, document) for document in SMALL.heldout("length_6")):
        assert words[1] == "<len_4>" and sum(word in "+-*" for word in words) == 6


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_length": 0}, "max_length"),
        ({"modulus": 1}, "modulus"),
        ({"loss_on": "anwser"}, "Did you mean 'answer'"),
        ({"other_lengths": (4,), "max_length": 4}, "other_lengths"),
        ({"heldout_problems": 0}, "heldout_problems"),
    ],
)
def test_wrong_settings(settings, says):
    with pytest.raises(ConfigError, match=says):
        Mano(**settings)
