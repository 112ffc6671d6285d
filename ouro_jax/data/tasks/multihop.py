"""Multi-hop questions over facts about people (paper, section 6.2 and appendix B.3).

People stand in layers of equal size. Each has, for every relation, one person of the next layer,
drawn uniformly: a fact, "The r of A is B ." A question starts in the first layer and follows k
facts: "Who is the r3 of the r2 of the r1 of A ? Answer: B". Names and relations are our own lists
and one token each.
"""

import collections
import functools
from dataclasses import dataclass

import numpy as np

from ouro_jax.data.packing import Document
from ouro_jax.data.tasks.invented import invented
from ouro_jax.data.tasks.task import Task, below
from ouro_jax.errors import require, require_choice

RELATIONS = (
    "instructor", "teacher", "ruler", "advisor", "neighbor", "partner", "mentor", "rival",
    "doctor", "lawyer", "employer", "landlord", "cousin", "guardian", "friend", "coach",
    "captain", "banker", "baker", "tailor", "barber", "editor", "client", "tenant", "witness",
    "sponsor", "follower", "critic", "pilot", "gardener", "librarian", "translator",
)  # fmt: skip
FACT = ("The", "of", "is", ".")
QUESTION = ("Who", "the", "?", "Answer:")


@dataclass(frozen=True)
class MultiHop(Task):
    """Settings: the graph, the questions trained on, and which of their tokens are learnt.

    Source `profiles`: a document tells `facts_per_profile` random facts of one person in random
    order (0: all of them). Source `questions`: `train_questions` unique ones, each equally often in
    an epoch; fewer are a subset of more. All tokens of a profile are learnt, of a question `all`
    or the `answer` (`loss_on`); the paper does not say which, nor the shares of the two sources.

    Held-out sets: `questions` are in no training set; `seen_questions` are among those trained on,
    so the difference is what was learnt by heart; `facts` are single facts as a profile starts with
    them. A wrong answer to a question whose facts are known is a failure to combine them.
    """

    entities: int = 500
    layers: int = 5
    relations: int = 20
    hops: int = 3
    train_questions: int = 120_000
    heldout_problems: int = 3000
    facts_per_profile: int = 0
    loss_on: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "data.task"
        require(self.layers >= 2, f"{key}.layers", self.layers, "at least 2")
        require(
            self.entities >= self.layers and self.entities % self.layers == 0, f"{key}.entities",
            self.entities, f"a multiple of {key}.layers = {self.layers}",
        )  # fmt: skip
        for name, most in (("relations", len(RELATIONS)), ("hops", self.layers - 1)):
            value = getattr(self, name)
            require(1 <= value <= most, f"{key}.{name}", value, f"1 to {most}")
        _ = self.names  # it checks how many there are
        left = self.num_questions - self.heldout_problems
        require(
            1 <= self.train_questions <= left, f"{key}.train_questions", self.train_questions,
            f"1 to {left:,}: of {self.num_questions:,} questions {self.heldout_problems:,} are "
            f"held out ({key}.heldout_problems)",
        )  # fmt: skip
        require(
            0 <= self.facts_per_profile <= self.relations, f"{key}.facts_per_profile",
            self.facts_per_profile, f"0 (all) to {key}.relations = {self.relations}",
        )  # fmt: skip
        require_choice(self.loss_on, ("all", "answer"), f"{key}.loss_on")

    @property
    def layer_size(self) -> int:
        return self.entities // self.layers

    @property
    def num_questions(self) -> int:
        """8e5 in the paper: a person of the first layer and a relation for each hop."""
        return self.layer_size * self.relations**self.hops

    @property
    def num_facts(self) -> int:
        """8,000 in the paper: the last layer has none."""
        return (self.layers - 1) * self.layer_size * self.relations

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """People, one layer after the other."""
        return invented("person", self.entities, "data.task.entities")

    @property
    def words(self) -> tuple[str, ...]:
        return (*FACT, *QUESTION, *RELATIONS[: self.relations], *self.names)

    @property
    def sources(self) -> tuple[str, ...]:
        return ("profiles", "questions")

    @property
    def heldout_sets(self) -> tuple[str, ...]:
        return ("questions", "seen_questions", "facts")

    def longest(self) -> int:
        return max(self._document_length(source) for source in self.sources)

    def num_rows(self, source: str, sequence_length: int) -> int:
        """Of questions, the fewest full rows in which each occurs equally often.

        Profiles have no epoch, or else each would keep a few orders of its facts.
        """
        if source == "profiles":
            return super().num_rows(source, sequence_length)
        per_row = sequence_length // self._document_length(source)
        return int(np.lcm(self.train_questions, per_row)) // per_row

    def documents(self, source: str, index: int, sequence_length: int) -> list[Document]:
        per_row = sequence_length // self._document_length(source)
        places = range(index * per_row, (index + 1) * per_row)
        if source == "questions":
            answer_only = self.loss_on == "answer"
            return [self._question(self._trained[place % self.train_questions], answer_only)
                    for place in places]  # fmt: skip
        with_facts = self.entities - self.layer_size
        return [self._profile(place % with_facts, place) for place in places]

    def heldout(self, name: str) -> list[Document]:
        if name == "facts":
            chosen = self.random_arrays(name).permutation(self.num_facts)[: self.heldout_problems]
            return [self._fact(number) for number in chosen.tolist()]
        asked = self._order if name == "questions" else self._trained
        return [self._question(number, True) for number in asked[: self.heldout_problems]]

    def chance(self, name: str) -> float:
        """The share of the most frequent answer in the set."""
        answers = [int(document.tokens[-1]) for document in self.heldout(name)]
        return max(collections.Counter(answers).values()) / len(answers)

    @functools.cached_property
    def _graph(self) -> np.ndarray:
        """[layers - 1, people of a layer, relations]: the place of B in the layer after A's."""
        shape = (self.layers - 1, self.layer_size, self.relations)
        return self.random_arrays("graph").randint(0, self.layer_size, shape)

    @functools.cached_property
    def _order(self) -> list[int]:
        """All questions in random order: first those held out, then those trained on."""
        return self.random_arrays("questions").permutation(self.num_questions).tolist()

    @functools.cached_property
    def _trained(self) -> list[int]:
        return self._order[self.heldout_problems :][: self.train_questions]

    def _document_length(self, source: str) -> int:
        if source == "questions":
            return 6 + 3 * self.hops
        return 7 * (self.facts_per_profile or self.relations)

    def _question(self, number: int, answer_only: bool) -> Document:
        shape = (self.layer_size, *[self.relations] * self.hops)
        start, *path = (int(part) for part in np.unravel_index(number, shape))
        place, asked = start, []
        for layer, relation in enumerate(path):
            place = self._graph[layer, place, relation]
            asked = ["the", RELATIONS[relation], "of", *asked]
        answer = self.names[self.hops * self.layer_size + place]
        words = ["Who", "is", *asked, self.names[start], "?", "Answer:", answer]
        return self._document(words, answer_only)

    def _profile(self, entity: int, exposure: int) -> Document:
        rng, relations = self.random("profiles", exposure), list(range(self.relations))
        words = []
        for _ in range(self.facts_per_profile or self.relations):
            relation = relations.pop(below(rng, len(relations)))
            words += [*self._fact_words(entity, relation), "."]
        return self._document(words, answer_only=False)

    def _fact(self, number: int) -> Document:
        return self._document(self._fact_words(*divmod(number, self.relations)), answer_only=True)

    def _fact_words(self, entity: int, relation: int) -> list[str]:
        layer, place = divmod(entity, self.layer_size)
        target = (layer + 1) * self.layer_size + self._graph[layer, place, relation]
        return ["The", RELATIONS[relation], "of", self.names[entity], "is", self.names[target]]

    def _document(self, words: list[str], answer_only: bool) -> Document:
        tokens = self.encode(words)
        return Document(tokens, np.arange(len(tokens)) == len(tokens) - 1 if answer_only else None)
