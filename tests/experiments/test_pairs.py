"""Question pairs: our own set, Quora's file, and the prompts made of them."""

import collections

import pytest

from ouro_jax.data.tokenizer import encode, train_tokenizer
from ouro_jax.errors import ConfigError
from ouro_jax.experiments.pairs import (
    PROMPT,
    QuestionPair,
    pair_questions,
    read_quora_pairs,
    template_pairs,
)


def test_template_pairs_are_different_and_half_of_them_the_same_intent():
    pairs = template_pairs(200)
    assert len(set(pairs)) == 200 and sum(pair.same for pair in pairs) == 100
    assert pairs == template_pairs(200) != template_pairs(200, seed=1)
    assert all(pair.first != pair.second for pair in pairs)
    # Pairs that differ share their thing about half of the time.
    shared = collections.Counter(
        pair.first.rstrip("?").split()[-1] in pair.second for pair in pairs if not pair.same
    )
    assert 25 < shared[True] < 75
    with pytest.raises(ConfigError, match="count = 100000"):
        template_pairs(100_000)


HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"


def test_quoras_file_is_read_with_its_quotes_and_gaps(tmp_path):
    path = tmp_path / "quora_duplicate_questions.tsv"
    path.write_text(
        HEADER + '0\t1\t2\tWhat is "it"?\tWhat\'s it?\t1\n'
        '1\t3\t4\t"Is a ""tab"" here?"\tOr not?\t0\n2\t5\t6\tNo second?\t\t0\n'
    )
    assert read_quora_pairs(path, 2) == [
        QuestionPair('What is "it"?', "What's it?", True),
        QuestionPair('Is a "tab" here?', "Or not?", False),
    ]
    assert read_quora_pairs(path, 1, seed=3) == read_quora_pairs(path, 1, seed=3)
    with pytest.raises(ConfigError, match="count = 3: expected 1 to the 2 pairs"):
        read_quora_pairs(path, 3)


def test_a_file_that_is_missing_or_another_is_explained(tmp_path):
    with pytest.raises(ConfigError, match="no such file. Expected quora_duplicate_questions.tsv"):
        read_quora_pairs(tmp_path / "quora.tsv", 10)
    other = tmp_path / "other.tsv"
    other.write_text("question1,question2\n")
    with pytest.raises(ConfigError, match="its columns are .'question1,question2'."):
        read_quora_pairs(other, 10)


def test_prompts_end_where_the_answers_begin_to_differ():
    tokenizer = train_tokenizer(["a text of few words"] * 3, 262)
    pairs = [QuestionPair("One?", "Two?", False), QuestionPair("Three?", "3?", True)]
    asked = pair_questions(tokenizer, pairs, "numbers")
    # Nothing was merged: both answers begin with a space, then T or F.
    prompt = PROMPT.format(first="One?", second="Two?")
    assert asked.prompts[0] == encode(tokenizer, prompt + " ")
    assert list(asked.candidates) == encode(tokenizer, "T") + encode(tokenizer, "F")
    assert asked.truth == [1, 0] and asked.positive == {0}
