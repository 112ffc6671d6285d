"""What a synthetic task is.

A task is a frozen dataclass: its fields are its settings. It has one or more sources of training
rows, which are mixed like any others, and sets of held-out problems. A row follows from the
settings, the source and the row's number alone, so rows need not be stored, and a run that was
interrupted reads the same ones.
"""

import abc
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ouro_jax.data.packing import Document
from ouro_jax.data.splits import stable_hash
from ouro_jax.errors import require

NUM_ROWS = 1 << 31  # as many as Grain shuffles: no run reads them all
END = "<eos>"  # the first token of every task's vocabulary: what ends a generated answer


@dataclass(frozen=True)
class Task(abc.ABC):
    """The settings that all tasks have, and what each has to say.

    `seed` decides everything random, `heldout_problems` how many problems each held-out set has.
    Wrong settings raise a ConfigError when the task is built.
    """

    seed: int = 0
    heldout_problems: int = 1024

    def __post_init__(self) -> None:
        require(
            self.heldout_problems >= 1, "data.task.heldout_problems", self.heldout_problems,
            "at least 1",
        )  # fmt: skip

    @property
    @abc.abstractmethod
    def words(self) -> tuple[str, ...]:
        """The vocabulary without `<eos>`; no word holds a space."""

    @property
    @abc.abstractmethod
    def sources(self) -> tuple[str, ...]:
        """The names of the sources of training rows, for `Stage.mixture`."""

    @property
    @abc.abstractmethod
    def heldout_sets(self) -> tuple[str, ...]:
        """The names of the sets of held-out problems; one named like a source is its own."""

    @abc.abstractmethod
    def longest(self) -> int:
        """Tokens of the longest problem: rows are at least as long."""

    @abc.abstractmethod
    def documents(self, source: str, index: int, sequence_length: int) -> list[Document]:
        """The problems of training row `index` of `source`, which fit into the row together.

        The loss mask of a document marks the tokens that are learnt; no mask: all of them.
        """

    def num_rows(self, source: str, sequence_length: int) -> int:
        """Rows of an epoch of `source`: read in a shuffled order, then again in another one."""
        del source, sequence_length
        return NUM_ROWS

    @abc.abstractmethod
    def heldout(self, name: str) -> list[Document]:
        """The problems of a held-out set; their loss masks mark the answers."""

    @abc.abstractmethod
    def chance(self, name: str) -> float:
        """The best exact match on a held-out set without reading the problem (0 to 1)."""

    def is_right(self, name: str, problem: Document, answer: Sequence[int]) -> bool | None:
        """Whether `answer`, as the model wrote it, solves a problem of the set `name`.

        None, as here, where each problem has one right answer, which the problem holds.
        """
        del name, problem, answer

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token ids by word."""
        return {word: number for number, word in enumerate((END, *self.words))}

    def encode(self, words: Sequence[str]) -> np.ndarray:
        """The token ids of `words`, int32."""
        return np.array([self.vocabulary[word] for word in words], np.int32)

    def random(self, *names: object) -> random.Random:
        """Random numbers that follow from the task's seed and `names` alone."""
        return random.Random(self._hash(names))

    def random_arrays(self, *names: object) -> np.random.RandomState:
        """The same for whole arrays; numpy promises that these numbers never change."""
        return np.random.RandomState(self._hash(names) % (1 << 32))

    def _hash(self, names: tuple[object, ...]) -> int:
        return stable_hash("/".join(map(str, (self.seed, *names))))


def below(rng: random.Random, bound: int) -> int:
    """A whole number of 0 … bound-1.

    Of the methods of `random`, `random()` alone is promised to give the same numbers in every
    version of Python.
    """
    return int(rng.random() * bound)
