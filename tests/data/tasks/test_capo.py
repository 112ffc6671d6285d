"""Capo's biographies read back: people, pools, masks, and how often each person is met."""

import collections
import math
import re

import numpy as np
import pytest

from ouro_jax.data.mixture import open_mixture
from ouro_jax.data.tasks.capo import Capo
from ouro_jax.data.tasks.capo_text import ATTRIBUTES, PHRASES
from ouro_jax.data.tasks.invented import ENDINGS, invented
from ouro_jax.data.tasks.rows import build_task
from ouro_jax.errors import ConfigError

SMALL = {
    "people": 60, "exposures": 7, "first_names": 5, "middle_names": 4, "last_names": 6,
    "birth_years": 10, "cities": 6, "universities": 5, "majors": 4, "employers": 8,
    "heldout_problems": 60,
}  # fmt: skip
LENGTH = 128


def words_of(task, document):
    names = {number: word for word, number in task.vocabulary.items()}
    return [names[token] for token in document.tokens.tolist()]


def biographies(task, length=LENGTH):
    names = {number: word for word, number in task.vocabulary.items()}
    return [
        [names[token] for token in document.tokens.tolist()]
        for index in range(task.num_rows("biographies", length))
        for document in task.documents("biographies", index, length)
    ]


def read(task, words):
    """A biography read back by its templates: the name and the attributes."""
    assert words[0] == "<bos>"
    person = {"name": " ".join(words[1:4])}
    sentences = [s.strip() + " ." for s in " ".join(words[4:]).split(" .") if s.strip()]
    assert len(sentences) == 5
    for place, sentence in enumerate(sentences):
        if place:
            pronoun, sentence = sentence.split(" ", 1)
            assert person.setdefault("pronoun", pronoun) == pronoun
        for attribute, phrases in PHRASES.items():
            for phrase in phrases[: task.templates]:
                pattern = re.escape(phrase).replace(r"\{\}", r"(\S+ \S+ , \S+|\S+|\S+ in \S+)")
                if match := re.fullmatch(pattern, sentence):
                    value = match.group(1)
                    is_date = value.count(" ") == 3
                    if is_date == (attribute == "birth_date") and attribute in kinds_of(value):
                        assert attribute not in person
                        person[attribute] = value
    assert set(person) >= {"name", "pronoun", *ATTRIBUTES}
    return person


def kinds_of(value):
    """Which attributes a value may belong to, by its ending."""
    if value.count(" ") == 3:
        return {"birth_date"}
    endings = {"birth_city": ENDINGS["city"], "university": ENDINGS["university"]}
    for attribute, known in endings.items():
        if " " not in value and value.endswith(known):
            return {attribute}
    return {"employer"} if value.split()[0].endswith(ENDINGS["employer"]) else {"major"}


@pytest.fixture(scope="module")
def people():
    """Every biography of the small task, by name."""
    task = Capo(**SMALL)
    found = collections.defaultdict(list)
    for words in biographies(task):
        person = read(task, words)
        found[person["name"]].append(person)
    return found


def test_each_person_is_met_exactly_as_often_as_set(people):
    assert len(people) == 60  # unique names
    assert {len(met) for met in people.values()} == {7}
    for met in people.values():
        assert all(person == met[0] for person in met)


def test_a_run_over_one_epoch_meets_each_person_so_often(tmp_path):
    root = build_task(tmp_path, {"name": "capo", **SMALL}, [LENGTH])
    mixture = open_mixture(root, {"biographies": 1.0}, sequence_length=LENGTH, seed=0)
    task, rows = Capo(**SMALL), mixture.describe()["biographies"].rows
    tokens = mixture.read(0, rows).tokens_BL
    bos = task.vocabulary["<bos>"]
    names = collections.Counter(
        tuple(row[start + 1 : start + 4]) for row in tokens for start in np.flatnonzero(row == bos)
    )
    assert len(names) == 60 and set(names.values()) == {7}


def test_the_employer_decides_the_city_and_values_are_uniform(people):
    places = collections.defaultdict(set)
    for met in people.values():
        employer, city = met[0]["employer"].split(" in ")
        places[employer].add(city)
    assert len(places) == 8 and all(len(cities) == 1 for cities in places.values())
    many = Capo(people=20_000, heldout_problems=1)
    _, values, genders = many._people
    for column, size in enumerate([12, 28, 200, 200, 300, 100, 263]):
        counts = np.unique([value[column] for value in values], return_counts=True)[1]
        expected = 20_000 / size
        assert len(counts) == size
        assert ((counts - expected) ** 2 / expected).sum() < size + 5 * math.sqrt(2 * size)
    assert abs(sum(genders) - 10_000) < 5 * 71


def test_sentences_are_drawn_anew_and_permuted():
    task = Capo(**{**SMALL, "people": 1, "heldout_problems": 1, "exposures": 200})
    met = biographies(task)
    assert len({" ".join(words) for words in met}) > 195
    first = collections.Counter(" ".join(words[4:]).split(" .")[0].split()[0] for words in met)
    assert len(first) > 40
    fixed = Capo(**{**SMALL, "order": "fixed", "templates": 1, "exposures": 2, "pronouns": "they",
                    "work_city": False})  # fmt: skip
    date, place = r"\w+ \d+ , \d+", r"\S+"
    shape = (
        rf"<bos> \S+ \S+ \S+ entered life on {date} \. They came from {place} \. "
        rf"They studied at {place} \. They studied {place} \. They worked for {place} \."
    )
    assert all(re.fullmatch(shape, " ".join(words)) for words in biographies(fixed))


@pytest.mark.parametrize("pronouns", ["he_she", "they"])
def test_masks_cover_exactly_names_and_counted_values(pronouns):
    task = Capo(**SMALL, pronouns=pronouns)
    for names, values in zip(task.heldout("names"), task.heldout("values"), strict=True):
        assert np.array_equal(names.tokens, values.tokens)
        words = np.array(words_of(task, names))
        assert names.loss_mask is not None and values.loss_mask is not None
        assert names.loss_mask.tolist() == [1 <= place < 4 for place in range(len(words))]
        person = read(task, words.tolist())
        month, day, _, year = person["birth_date"].split()
        expected = [month, day, year, person["birth_city"], person["university"], person["major"],
                    person["employer"].split(" in ")[0]]  # fmt: skip
        expected += [person["pronoun"]] if pronouns == "he_she" else []
        assert sorted(words[values.loss_mask]) == sorted(expected)


def test_a_name_stands_before_everything_else_and_a_city_behind_its_employer():
    for phrases in PHRASES.values():
        assert len(set(phrases)) == 16
        lengths = [len(phrase.split()) for phrase in phrases]
        assert lengths[0] == lengths[1] <= 6
        for phrase in phrases:
            assert phrase.count("{}") == 1 and phrase.endswith(" .")
            assert phrase.split()[0] not in ("{}", "was", "is", "has", "were", "are", "have")
    for words in biographies(Capo(**{**SMALL, "exposures": 1})):
        place = next(i for i, word in enumerate(words) if word.endswith(ENDINGS["employer"]))
        assert words[place + 1] == "in" and words[place + 2].endswith(ENDINGS["city"])


def test_bits_of_the_paper_and_of_small_pools():
    task = Capo(heldout_problems=1)
    assert task.name_bits == pytest.approx(27.25, abs=0.005)
    assert task.value_bits == pytest.approx(47.59, abs=0.005)
    small = Capo(**SMALL)
    assert small.name_bits == pytest.approx(math.log2(5 * 4 * 6))
    assert small.value_bits == pytest.approx(math.log2(2 * 12 * 28 * 10 * 6 * 5 * 4 * 8))
    assert Capo(**SMALL, pronouns="they").value_bits == pytest.approx(small.value_bits - 1)


def test_biographies_always_fit_and_the_longest_is_reached():
    for change in ({}, {"work_city": False}, {"templates": 2, "order": "fixed"}):
        task = Capo(**{**SMALL, "exposures": 50, **change})
        lengths = {len(words) for words in biographies(task)}
        assert max(lengths) <= task.longest()
        assert max(lengths) >= task.longest() - 5
    words = Capo().words
    assert len(set(words)) == len(words) and "<eos>" not in words and " " not in "".join(words)


def test_everyone_has_a_name_even_if_all_names_are_taken():
    task = Capo(**{**SMALL, "people": 120, "exposures": 1})
    assert len({" ".join(words[1:4]) for words in biographies(task)}) == 120


def test_invented_words_are_distinct():
    pools = [invented(kind, 5120, "") for kind in ENDINGS]
    assert len(set().union(*pools)) == 5120 * len(ENDINGS)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"people": 121}, "people = 121: expected 1 to 120, the names"),
        ({"people": 50}, "heldout_problems = 60: expected at most data.task.people = 50"),
        ({"majors": 101}, "majors = 101: expected 1 to 100"),
        ({"cities": 6000}, "cities = 6000"),
        ({"templates": 17}, "templates"),
        ({"exposures": 0}, "exposures"),
        ({"order": "permutted"}, "Did you mean 'permuted'"),
        ({"pronouns": "it"}, "pronouns"),
    ],
)
def test_wrong_settings(settings, says):
    with pytest.raises(ConfigError, match=says):
        Capo(**{**SMALL, **settings})
