"""Capo: how much a model can store, measured on made-up biographies, bioS(N) (paper, appendix B.1).

N people have unique names and random attributes: birth date, birth city, university, major and
employer; the employer's city follows from the employer. A biography has a sentence for each, drawn
anew for every exposure. Nothing but memory helps to predict a name or a value, so the loss on
them says how many bits are stored (`experiments/capacity.py`).
"""

import functools
import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ouro_jax.data.packing import Document
from ouro_jax.data.tasks.capo_text import ATTRIBUTES, MAJORS, MONTHS, PHRASES
from ouro_jax.data.tasks.invented import invented
from ouro_jax.data.tasks.task import Task, below
from ouro_jax.errors import require, require_choice

DAYS = 28
FIRST_YEAR = 1900
TEMPLATE, NAME, VALUE = range(3)  # what a token of a biography is
PRONOUNS = {"he_she": ("He", "She"), "they": ("They", "They")}


class Part(NamedTuple):
    """Tokens, and for each what it is."""

    tokens: list[int]
    kinds: list[int]


@dataclass(frozen=True)
class Capo(Task):
    """Settings: how many people, the sizes of the pools, and how they are written about.

    One epoch of the source `biographies` is `exposures` biographies of every person in a shuffled
    order: a run over one epoch reads each person exactly so often, each time in other words. Its
    last row may be shorter. A row holds as many as fit if all are of the longest kind.

    `templates` sentences per attribute are used. `order` of the sentences is `permuted`, as in the
    paper's example, or `fixed`. With `pronouns` `he_she` a person's gender is one bit, told by the
    first pronoun; with `they`, as in the paper's example, it is not told and not counted. With
    `work_city` the employer's city is named behind the employer; it is not counted.

    Sets `names` and `values` hold the same biographies with the loss on the name, or on the values
    that are counted. Their people are those of the training set: memory is what is measured.
    """

    people: int = 20_000
    exposures: int = 1000
    first_names: int = 400
    middle_names: int = 400
    last_names: int = 1000
    birth_years: int = 200
    cities: int = 200
    universities: int = 300
    majors: int = 100
    employers: int = 263
    templates: int = 16
    order: str = "permuted"
    pronouns: str = "he_she"
    work_city: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "data.task"
        for name, most in (
            ("exposures", None), ("birth_years", None), ("majors", len(MAJORS)),
            ("templates", min(map(len, PHRASES.values()))),
        ):  # fmt: skip
            value, expected = getattr(self, name), f"1 to {most}" if most else "at least 1"
            require(1 <= value <= (most or value), f"{key}.{name}", value, expected)
        require_choice(self.order, ("permuted", "fixed"), f"{key}.order")
        require_choice(self.pronouns, PRONOUNS, f"{key}.pronouns")
        _ = self._names, self._values  # they check the sizes of their pools
        pool = math.prod(map(len, self._names))
        require(
            1 <= self.people <= pool, f"{key}.people", self.people,
            f"1 to {pool:,}, the names that first_names x middle_names x last_names give",
        )  # fmt: skip
        require(
            self.heldout_problems <= self.people, f"{key}.heldout_problems", self.heldout_problems,
            f"at most {key}.people = {self.people:,}",
        )  # fmt: skip

    @property
    def name_bits(self) -> float:
        """log2 N0: the bits of a name (27.25 in the paper)."""
        return sum(math.log2(len(pool)) for pool in self._names)

    @property
    def value_bits(self) -> float:
        """log2 S0: the bits of a person's counted values (47.59 in the paper)."""
        gender = 1 if self.pronouns == "he_she" else 0
        return gender + sum(math.log2(size) for size in self._value_sizes)

    @functools.cached_property
    def _names(self) -> tuple[tuple[str, ...], ...]:
        return tuple(invented(kind, getattr(self, f"{kind}_names"), f"data.task.{kind}_names")
                     for kind in ("first", "middle", "last"))  # fmt: skip

    @functools.cached_property
    def _values(self) -> dict[str, tuple[str, ...]]:
        """The pools of values, in the order of `_people`'s columns."""
        years = range(FIRST_YEAR, FIRST_YEAR + self.birth_years)
        return {
            "month": MONTHS,
            "day": tuple(map(str, range(1, DAYS + 1))),
            "year": tuple(map(str, years)),
            "birth_city": invented("city", self.cities, "data.task.cities"),
            "university": invented("university", self.universities, "data.task.universities"),
            "major": MAJORS[: self.majors],
            "employer": invented("employer", self.employers, "data.task.employers"),
        }

    @property
    def _value_sizes(self) -> list[int]:
        return [len(pool) for pool in self._values.values()]

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        phrases = [p for name in ATTRIBUTES for p in PHRASES[name][: self.templates]]
        text = {word for phrase in phrases for word in phrase.split()} - {"{}"}
        text |= {",", *PRONOUNS[self.pronouns], *(("in",) if self.work_city else ())}
        pools = (*self._names, *self._values.values())
        return ("<bos>", *sorted(text), *(word for pool in pools for word in pool))

    @property
    def sources(self) -> tuple[str, ...]:
        return ("biographies",)

    @property
    def heldout_sets(self) -> tuple[str, ...]:
        return ("names", "values")

    def longest(self) -> int:
        return self._longest

    def num_rows(self, source: str, sequence_length: int) -> int:
        return -(-self.people * self.exposures // (sequence_length // self.longest()))

    def documents(self, source: str, index: int, sequence_length: int) -> list[Document]:
        per_row, rng = sequence_length // self.longest(), self.random(source, index)
        end = min((index + 1) * per_row, self.people * self.exposures)
        numbers = range(index * per_row, end)
        return [Document(np.array(self._biography(number % self.people, rng).tokens, np.int32))
                for number in numbers]  # fmt: skip

    def heldout(self, name: str) -> list[Document]:
        kind, problems = {"names": NAME, "values": VALUE}[name], []
        for number in range(self.heldout_problems):
            person = number * self.people // self.heldout_problems
            tokens, kinds = self._biography(person, self.random("heldout", person))
            problems.append(Document(np.array(tokens, np.int32), np.array(kinds) == kind))
        return problems

    def chance(self, name: str) -> float:
        """One person of all, or one choice of all values."""
        return 1 / self.people if name == "names" else 2**-self.value_bits

    @functools.cached_property
    def _sentences(self) -> dict[str, list[tuple[list[int], list[int]]]]:
        """For each attribute the tokens before and behind the value, of every template."""

        def cut(phrase: str) -> tuple[list[int], list[int]]:
            before, after = phrase.split("{}")
            return self.encode(before.split()).tolist(), self.encode(after.split()).tolist()

        return {name: [cut(phrase) for phrase in PHRASES[name][: self.templates]]
                for name in ATTRIBUTES}  # fmt: skip

    @functools.cached_property
    def _longest(self) -> int:
        longest = sum(max(len(before) + len(after) for before, after in self._sentences[name])
                      for name in ATTRIBUTES)  # fmt: skip
        # <bos>, a name and four pronouns; a date is four tokens, with a city an employer three.
        return longest + 1 + 3 + 4 + (4 + 1 + 1 + 1 + (3 if self.work_city else 1))

    @functools.cached_property
    def _people(self) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Of each person the tokens of name and values, and the gender, 0 or 1."""
        numbers = self.random_arrays("people")
        sizes = [len(pool) for pool in self._names]
        chosen: dict[int, None] = {}
        while len(chosen) < self.people:
            drawn = numbers.randint(0, math.prod(sizes), self.people)
            chosen.update(dict.fromkeys(drawn.tolist()))
        names = np.unravel_index(list(chosen)[: self.people], sizes)
        values = [numbers.randint(0, size, self.people) for size in self._value_sizes]
        return (
            self._tokens(self._names, names),
            self._tokens(tuple(self._values.values()), values),
            numbers.randint(0, 2, self.people).tolist(),
        )

    def _tokens(self, pools: tuple[tuple[str, ...], ...], columns) -> list[list[int]]:
        tokens = [self.encode(pool)[column] for pool, column in zip(pools, columns, strict=True)]
        return np.stack(tokens, axis=1).tolist()

    @functools.cached_property
    def _work_cities(self) -> dict[int, int]:
        """The city of each employer, both as tokens."""
        cities = self.encode(self._values["birth_city"])
        drawn = self.random_arrays("work_cities").randint(0, len(cities), self.employers)
        return dict(zip(self.encode(self._values["employer"]).tolist(), cities[drawn].tolist(),
                        strict=True))  # fmt: skip

    def _biography(self, person: int, rng: random.Random) -> Part:
        names, values, genders = self._people
        pronoun = self.vocabulary[PRONOUNS[self.pronouns][genders[person]]]
        attributes = list(ATTRIBUTES)
        if self.order == "permuted":
            attributes = [attributes.pop(below(rng, len(attributes))) for _ in ATTRIBUTES]
        tokens = [self.vocabulary["<bos>"], *names[person]]
        kinds = [TEMPLATE, NAME, NAME, NAME]
        for place, name in enumerate(attributes):
            if place:
                tokens.append(pronoun)
                kinds.append(VALUE if place == 1 and self.pronouns == "he_she" else TEMPLATE)
            before, after = self._sentences[name][below(rng, self.templates)]
            value = self._value(name, values[person])
            tokens += before + value.tokens + after
            kinds += [TEMPLATE] * len(before) + value.kinds + [TEMPLATE] * len(after)
        return Part(tokens, kinds)

    def _value(self, attribute: str, values: list[int]) -> Part:
        month, day, year, city, university, major, employer = values
        if attribute == "birth_date":
            return Part([month, day, self.vocabulary[","], year], [VALUE, VALUE, TEMPLATE, VALUE])
        if attribute == "employer" and self.work_city:
            place = [self.vocabulary["in"], self._work_cities[employer]]
            return Part([employer, *place], [VALUE, TEMPLATE, TEMPLATE])
        single = {"birth_city": city, "university": university, "major": major,
                  "employer": employer}  # fmt: skip
        return Part([single[attribute]], [VALUE])
