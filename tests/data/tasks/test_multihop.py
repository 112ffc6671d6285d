"""Multi-hop questions against the graph as the profiles tell it, and the paper's counts."""

import collections
import re

import pytest

from ouro_jax.data.mixture import open_mixture
from ouro_jax.data.tasks.multihop import RELATIONS, MultiHop
from ouro_jax.data.tasks.rows import build_task
from ouro_jax.errors import ConfigError

SMALL = {"entities": 80, "layers": 4, "relations": 5, "train_questions": 1000,
         "heldout_problems": 300}  # fmt: skip
LENGTH = 64


def texts(task, documents):
    names = {number: word for word, number in task.vocabulary.items()}
    return [" ".join(names[token] for token in document.tokens.tolist()) for document in documents]


def told(task, rows=200, length=LENGTH):
    """The facts that profiles tell, as {(relation, A): B}; each is told alike everywhere."""
    facts = {}
    for index in range(rows):
        for text in texts(task, task.documents("profiles", index, length)):
            found = re.findall(r"The (\w+) of (\w+) is (\w+) \.", text)
            assert " ".join(f"The {r} of {a} is {b} ." for r, a, b in found) == text
            assert len({a for _, a, _ in found}) == 1
            for relation, a, b in found:
                assert facts.setdefault((relation, a), b) == b
    return facts


def answer(facts, text):
    """Follows the facts, read from the inside of the question outwards; returns (found, said)."""
    question, said = text.split(" ? Answer: ")
    asked, person = re.fullmatch(r"Who is (.*) of (\w+)", question).groups()
    for relation in reversed(asked.removeprefix("the ").split(" of the ")):
        person = facts[relation, person]
    return person, said


def training_questions(task, length=LENGTH):
    rows = range(task.num_rows("questions", length))
    return [text for i in rows for text in texts(task, task.documents("questions", i, length))]


@pytest.mark.parametrize("change", [{}, {"hops": 2, "train_questions": 150}, {"seed": 5}])
def test_answers_follow_from_the_facts_of_the_profiles(change):
    task = MultiHop(**{**SMALL, "heldout_problems": 100, **change})
    facts = told(task)
    assert len(facts) == task.num_facts == 60 * 5
    for text in [*training_questions(task), *texts(task, task.heldout("questions"))]:
        found, said = answer(facts, text)
        assert found == said and text.count(" of ") == task.hops


def test_people_lead_from_layer_to_layer_and_targets_are_uniform():
    task = MultiHop(**{**SMALL, "relations": 32})
    layer = {name: number // 20 for number, name in enumerate(task.names)}
    facts = told(task, rows=60, length=32 * 7)
    assert len(facts) == 60 * 32 and all(layer[b] == layer[a] + 1 for (_, a), b in facts.items())
    counts = collections.Counter(facts.values())
    assert len(counts) == 60 and max(counts.values()) < 32 + 5 * 32**0.5


def test_counts_of_the_paper():
    task = MultiHop()
    assert (task.num_questions, task.num_facts, len(task.words)) == (800_000, 8_000, 528)
    assert len(task.heldout("questions")) == 3000
    assert task.documents("profiles", 0, 1024)[0].loss_mask is None
    assert len(task.documents("profiles", 0, 1024)[0].tokens) == task.longest() == 140
    assert len(set(RELATIONS)) == len(RELATIONS)


def test_no_heldout_question_is_trained_on_and_subsets_are_nested():
    few = MultiHop(**SMALL)
    more = MultiHop(**{**SMALL, "train_questions": 20 * 125 - 300})
    heldout = set(texts(few, few.heldout("questions")))
    assert heldout == set(texts(more, more.heldout("questions"))) and len(heldout) == 300
    trained, all_trained = set(training_questions(few)), set(training_questions(more))
    assert len(trained) == 1000 and len(all_trained) == 2200 and trained < all_trained
    assert not heldout & all_trained and len(heldout | all_trained) == few.num_questions
    assert set(texts(few, few.heldout("seen_questions"))) <= trained
    assert set(training_questions(MultiHop(**SMALL, seed=1))) != trained


@pytest.mark.parametrize(("questions", "length"), [(1000, 64), (1001, 60), (7, 15)])
def test_an_epoch_has_each_question_equally_often_in_full_rows(questions, length):
    task = MultiHop(**{**SMALL, "train_questions": questions, "facts_per_profile": 2})
    counts = collections.Counter(training_questions(task, length))
    assert len(counts) == questions and len(set(counts.values())) == 1


def test_profiles_tell_other_facts_first_each_time():
    task = MultiHop(**SMALL, facts_per_profile=2)
    first = collections.defaultdict(set)
    for index in range(600):
        for text in texts(task, task.documents("profiles", index, LENGTH)):
            _, relation, _, person, *_ = text.split()
            first[person].add(relation)
            assert len(text.split()) == 14
    assert len(first) == 60 and all(len(relations) == 5 for relations in first.values())


def test_heldout_facts_are_those_told():
    task = MultiHop(**SMALL)
    facts = told(task)
    heldout = texts(task, task.heldout("facts"))
    assert len(set(heldout)) == 300 == len(facts)
    for text in heldout:
        relation, a, b = re.fullmatch(r"The (\w+) of (\w+) is (\w+)", text).groups()
        assert facts[relation, a] == b


def test_masks_mark_the_answer():
    task = MultiHop(**SMALL, loss_on="answer")
    rows = task.documents("questions", 0, LENGTH)
    for document in rows + task.heldout("questions")[:5] + task.heldout("facts")[:5]:
        assert document.loss_mask is not None
        assert document.loss_mask.tolist() == [False] * (len(document.tokens) - 1) + [True]
    assert MultiHop(**SMALL).documents("questions", 0, LENGTH)[0].loss_mask is None


def test_chance_is_the_best_constant_answer():
    task = MultiHop(**SMALL)
    answers = [text.split()[-1] for text in texts(task, task.heldout("questions"))]
    best = max(sum(a == name for a in answers) for name in task.names)
    assert task.chance("questions") == best / 300 and 1 / 20 <= best / 300 < 1 / 4


def test_both_sources_are_mixed(tmp_path):
    root = build_task(tmp_path, {"name": "multihop", **SMALL}, [LENGTH])
    mixture = open_mixture(
        root, {"profiles": 0.25, "questions": 0.75}, sequence_length=LENGTH, seed=0
    )
    summary = mixture.describe()
    assert summary["questions"].rows == 250 and summary["profiles"].rows == 1 << 31
    assert mixture.order.drawn(400) == {"profiles": 100, "questions": 300}
    task = MultiHop(**SMALL)
    who = task.vocabulary["Who"]
    batch = mixture.read(0, 400)
    assert (batch.tokens_BL == who).sum() == 300 * 4
    assert len({row.tobytes() for row in batch.tokens_BL[(batch.tokens_BL == who).any(1)]}) == 250


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train_questions": 797_001}, "train_questions = 797001: expected 1 to 797,000"),
        ({"entities": 501}, "entities"),
        ({"layers": 3}, "hops = 3: expected 1 to 2|entities"),
        ({"relations": 99}, "relations = 99: expected 1 to 32"),
        ({"entities": 10**5}, "entities = 100000: expected 1 to 5,120"),
        ({"facts_per_profile": 21}, "facts_per_profile"),
        ({"loss_on": "answr"}, "Did you mean 'answer'"),
    ],
)
def test_wrong_settings(settings, says):
    with pytest.raises(ConfigError, match=says):
        MultiHop(**settings)
