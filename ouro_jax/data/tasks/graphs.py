"""What Depo and Brevo share: a graph in the problem's text, edge by edge, whose nodes have names.

A name is one or more of the symbols 1 … V; its last token is shifted by V, so its end is visible.
A problem has n of 3 … N nodes, n with a probability proportional to 1/(n + √N) (Physics of Language
Models 4.1).
"""

import abc
import bisect
import functools
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ouro_jax.data.packing import Document
from ouro_jax.data.splits import in_split
from ouro_jax.data.tasks.task import Task, below
from ouro_jax.errors import ConfigError, require

MIN_NODES = 3

Name = tuple[int, ...]  # token ids, which are the numbers of the symbols
Edge = tuple[Name, Name]
T = TypeVar("T")


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they were made, edges in that in which they are written."""

    nodes: list[Name]
    edges: list[Edge]

    def key(self) -> str:
        """The same text for the same edges, in whatever order."""
        return str(sorted(self.edges))

    def edge_tokens(self) -> list[int]:
        """The names of the edges' ends, one after the other."""
        return [token for edge in self.edges for name in edge for token in name]


@dataclass(frozen=True)
class GraphTask(Task):
    """Settings: N, the V symbols of names, and the shortest and longest name in tokens.

    The nodes of a problem have different names: one of uniform length and symbols is drawn until
    it is none that is there.

    One graph in twenty of those sizes that are evaluated is held out, chosen by a hash of its
    edges: no training problem of any row has such a graph, whatever is asked of it.
    """

    max_nodes: int = 225
    symbols: int = 50
    min_name: int = 1
    max_name: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.symbols >= 1, "data.task.symbols", self.symbols, "at least 1")
        require(self.min_name >= 1, "data.task.min_name", self.min_name, "at least 1")
        require(
            self.max_name >= self.min_name, "data.task.max_name", self.max_name,
            f"at least data.task.min_name = {self.min_name}",
        )  # fmt: skip
        self.require_nodes("max_nodes", self.max_nodes)

    def require_nodes(self, key: str, nodes: int) -> None:
        """Raises a ConfigError if there are no graphs of so many nodes, or not so many names."""
        names = sum(self.symbols**length for length in range(self.min_name, self.max_name + 1))
        require(
            MIN_NODES <= nodes <= names, f"data.task.{key}", nodes,
            f"{MIN_NODES} to {names}, as many as there are names of {self.min_name} to "
            f"{self.max_name} tokens of {self.symbols} symbols",
        )  # fmt: skip

    @property
    def words(self) -> tuple[str, ...]:
        # Behind <eos>, which is token 0: so the id of a symbol is its number.
        return (*map(str, range(1, 2 * self.symbols + 1)), *self.marks)

    @property
    @abc.abstractmethod
    def marks(self) -> tuple[str, ...]:
        """The words that are no parts of names."""

    @abc.abstractmethod
    def size(self, nodes: int) -> int:
        """Tokens that a problem of so many nodes has at most."""

    @abc.abstractmethod
    def draw(self, rng: random.Random, nodes: int) -> Graph:
        """A random graph."""

    @abc.abstractmethod
    def training_problem(self, rng: random.Random, graph: Graph) -> Document:
        """The text of `graph` and what is asked of it in training."""

    @abc.abstractmethod
    def heldout_problem(self, rng: random.Random, graph: Graph, name: str) -> Document:
        """The same for a held-out set."""

    def heldout_nodes(self, name: str) -> int:
        """The nodes of each graph of a held-out set."""
        del name
        return self.max_nodes

    def longest(self) -> int:
        return max(self.size(self.heldout_nodes(name)) for name in self.heldout_sets)

    def documents(self, source: str, index: int, sequence_length: int) -> list[Document]:
        """As many problems as surely fit, all with the same number n of nodes.

        Rows filled with problems of any n would have to leave out those that do not fit at their
        ends, the large ones above all. So a row of problems of n nodes is drawn as much more
        seldom as it holds more of them, and n has the stated distribution over all problems.
        """
        rng = self.random(source, index)
        cumulative = _row_sizes(self, sequence_length)
        nodes = MIN_NODES + bisect.bisect(cumulative, rng.random() * cumulative[-1])
        return [
            self.training_problem(rng, self._training_graph(rng, nodes))
            for _ in range(sequence_length // self.size(nodes))
        ]

    def heldout(self, name: str) -> list[Document]:
        return list(_heldout(self, name))

    def _training_graph(self, rng: random.Random, nodes: int) -> Graph:
        graph = self.draw(rng, nodes)
        evaluated = {self.heldout_nodes(name) for name in self.heldout_sets}
        while nodes in evaluated and in_split(graph.key(), "heldout"):
            graph = self.draw(rng, nodes)
        return graph

    def draw_names(self, rng: random.Random, count: int) -> list[Name]:
        """So many different names, in a random order."""
        names: dict[Name, None] = {}
        while len(names) < count:
            length = self.min_name + below(rng, self.max_name - self.min_name + 1)
            name = [1 + below(rng, self.symbols) for _ in range(length)]
            name[-1] += self.symbols
            names[tuple(name)] = None
        # Where short names run out, the later ones are long.
        return sample(rng, list(names), count)

    def read_names(self, tokens: Iterable[int]) -> list[Name] | None:
        """The names that `tokens` spell one after the other; None if they are no names."""
        names, name = [], ()
        for token in tokens:
            if not 1 <= token <= 2 * self.symbols:
                return None
            name = (*name, token)
            if token > self.symbols:
                names.append(name)
                name = ()
        return None if name else names

    def document(self, parts: Iterable[tuple[bool, Sequence[int]]]) -> Document:
        """A document of parts, each with whether the loss mask marks its tokens."""
        parts = list(parts)
        tokens = np.array([token for _, part in parts for token in part], np.int32)
        return Document(tokens, np.repeat([learnt for learnt, _ in parts],
                                          [len(part) for _, part in parts]))  # fmt: skip


def sample(rng: random.Random, items: Iterable[T], count: int) -> list[T]:
    """`count` of the items in a random order, none twice."""
    pool = list(items)
    for place in range(count):
        other = place + below(rng, len(pool) - place)
        pool[place], pool[other] = pool[other], pool[place]
    return pool[:count]


def size_weight(nodes: int, max_nodes: int) -> float:
    """What the probability of a problem of so many nodes is proportional to."""
    return 1 / (nodes + math.sqrt(max_nodes))


@functools.cache
def _heldout(task: GraphTask, name: str) -> tuple[Document, ...]:
    """Different graphs; kept, since seconds go by until so many are found of the paper's size."""
    rng, nodes = task.random("heldout", name), task.heldout_nodes(name)
    seen, problems = set(), []
    # One graph in twenty will do; more attempts find most of them where there are few.
    for _ in range(1000 + 100 * task.heldout_problems):
        graph = task.draw(rng, nodes)
        key = graph.key()
        if key not in seen and in_split(key, "heldout"):
            seen.add(key)
            problems.append(task.heldout_problem(rng, graph, name))
        if len(problems) == task.heldout_problems:
            return tuple(problems)
    raise ConfigError(
        f"data.task.heldout_problems = {task.heldout_problems}: found {len(problems)} different "
        f"graphs of {nodes} nodes to hold out; expected as many. Take more symbols or nodes, or "
        "fewer problems."
    )


@functools.cache
def _row_sizes(task: GraphTask, sequence_length: int) -> list[float]:
    """Cumulative weights of rows with problems of 3, 4, … N nodes."""
    return list(itertools.accumulate(
        size_weight(nodes, task.max_nodes) / (sequence_length // task.size(nodes))
        for nodes in range(MIN_NODES, task.max_nodes + 1)
    ))  # fmt: skip
