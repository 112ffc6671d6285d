"""Mano: modular arithmetic on prefix expressions of up to L operations (paper, section 6.2).

An expression of l operations is drawn as in Physics of Language Models 4.1: its operation is one
of + - *, its left operand has 0 … l-1 of the other l-1 operations, its right operand the rest; one
of no operations is a number. A problem is `<bos> <len_l> expression <ans> answer`, a token each.
"""

import functools
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ouro_jax.data.packing import Document
from ouro_jax.data.splits import in_split
from ouro_jax.data.tasks.task import Task, below
from ouro_jax.errors import require, require_choice

OPERATIONS = ("+", "-", "*")
FRAME = 4  # tokens beside the expression: <bos>, <len_l>, <ans> and the answer


@dataclass(frozen=True)
class Mano(Task):
    """Settings: L, the modulus, which tokens are learnt, and the lengths evaluated beside L.

    One problem of length L in twenty is held out, chosen by its hash, and the held-out set `mano`
    is drawn from these. Sets `length_<l>` hold problems of other lengths: shorter ones may occur
    in training, longer ones do not, and carry the token `<len_L>`, since none of their own was
    ever trained. `loss_on` is `all`, as in the paper, or `answer`.
    """

    max_length: int = 10
    modulus: int = 23
    loss_on: str = "all"
    other_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_length >= 1, "data.task.max_length", self.max_length, "at least 1")
        require(self.modulus >= 2, "data.task.modulus", self.modulus, "at least 2")
        require_choice(self.loss_on, ("all", "answer"), "data.task.loss_on")
        for length in self.other_lengths:
            require(
                length >= 1 and length != self.max_length, "data.task.other_lengths",
                self.other_lengths, f"lengths from 1 on but for max_length = {self.max_length}",
            )  # fmt: skip

    @property
    def words(self) -> tuple[str, ...]:
        lengths = (f"<len_{length}>" for length in range(1, self.max_length + 1))
        return ("<bos>", "<ans>", *OPERATIONS, *map(str, range(self.modulus)), *lengths)

    @property
    def sources(self) -> tuple[str, ...]:
        return ("mano",)

    @property
    def heldout_sets(self) -> tuple[str, ...]:
        return ("mano", *(f"length_{length}" for length in self.other_lengths))

    def longest(self) -> int:
        # A row holds problems in pairs of lengths l and L+1-l.
        pair = 2 * (self.max_length + 1) + 2 * (1 + FRAME)
        return max(pair, *(2 * length + 1 + FRAME for length in self.other_lengths), 0)

    def documents(self, source: str, index: int, sequence_length: int) -> list[Document]:
        """As many pairs of lengths l and L+1-l as fit: l is uniform, and no row has padding but
        what is too short for a pair (of the paper's 1,024 tokens 0, 12 and 4 at L = 10, 16, 24)."""
        rng = self.random(source, index)
        pairs = sequence_length // (2 * (self.max_length + 1) + 2 * (1 + FRAME))
        documents = []
        for _ in range(pairs):
            length = 1 + below(rng, self.max_length)
            documents += [self._training_problem(rng, length),
                          self._training_problem(rng, self.max_length + 1 - length)]  # fmt: skip
        return documents

    def heldout(self, name: str) -> list[Document]:
        length = self._length(name)
        rng, seen, problems = self.random("heldout", name), set(), []
        # Short lengths do not have that many problems: then the set holds what was found.
        for _ in range(100 * self.heldout_problems):
            expression = draw(rng, length, self.modulus)
            text = " ".join(expression)
            if text not in seen and (length != self.max_length or in_split(text, "heldout")):
                seen.add(text)
                problems.append(self._document(expression, length, answer_only=True))
            if len(problems) == self.heldout_problems:
                break
        return problems

    def chance(self, name: str) -> float:
        """The probability of the most frequent answer, which is 0, exactly."""
        return float(answer_distribution(self._length(name), self.modulus).max())

    def _length(self, name: str) -> int:
        return self.max_length if name == "mano" else int(name.removeprefix("length_"))

    def _training_problem(self, rng: random.Random, length: int) -> Document:
        expression = draw(rng, length, self.modulus)
        while length == self.max_length and in_split(" ".join(expression), "heldout"):
            expression = draw(rng, length, self.modulus)
        return self._document(expression, length, self.loss_on == "answer")

    def _document(self, expression: list[str], length: int, answer_only: bool) -> Document:
        label = f"<len_{min(length, self.max_length)}>"
        answer = str(evaluate(expression, self.modulus))
        tokens = self.encode(["<bos>", label, *expression, "<ans>", answer])
        if not answer_only:
            return Document(tokens)
        mask = np.zeros(len(tokens), bool)
        mask[-1] = True
        return Document(tokens, mask)


def draw(rng: random.Random, length: int, modulus: int) -> list[str]:
    """A random expression of `length` operations, in prefix order."""
    if length == 0:
        return [str(below(rng, modulus))]
    operation, left = OPERATIONS[below(rng, 3)], below(rng, length)
    return [operation, *draw(rng, left, modulus), *draw(rng, length - 1 - left, modulus)]


def evaluate(expression: list[str], modulus: int) -> int:
    """The value of a prefix expression, modulo `modulus`."""
    return _evaluate(iter(expression), modulus)


def _evaluate(words: Iterator[str], modulus: int) -> int:
    word = next(words)
    if word not in OPERATIONS:
        return int(word)
    return apply(word, _evaluate(words, modulus), _evaluate(words, modulus), modulus)


def apply(operation: str, left: int, right: int, modulus: int) -> int:
    """`left` operation `right`, modulo `modulus`."""
    results = {"+": left + right, "-": left - right, "*": left * right}
    return results[operation] % modulus


@functools.cache
def answer_distribution(length: int, modulus: int) -> np.ndarray:
    """The probability of each answer [modulus] of a random expression of `length` operations."""
    if length == 0:
        return np.full(modulus, 1 / modulus)
    total = np.zeros(modulus)
    for left_length, operation in itertools.product(range(length), OPERATIONS):
        left = answer_distribution(left_length, modulus)
        right = answer_distribution(length - 1 - left_length, modulus)
        for a, b in itertools.product(range(modulus), repeat=2):
            total[apply(operation, a, b, modulus)] += left[a] * right[b]
    return total / (3 * length)
