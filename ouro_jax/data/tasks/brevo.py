"""Brevo: all that a node depends on, in an order in which each comes after what it depends on.

A problem is `<bos> a b … <query> q <ans> … q <eos>` (Physics of Language Models 4.1): the edges of
a directed acyclic graph in a random order, each a parent and its child, and a node; the answer
lists its ancestors in a topological order, and the node at the end.
"""

import collections
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ouro_jax.data.packing import Document
from ouro_jax.data.tasks.graphs import Edge, Graph, GraphTask, Name, sample
from ouro_jax.data.tasks.task import END, below
from ouro_jax.errors import require, require_choice

MAX_DEGREE = 4
EDGES_PER_NODE = 3  # at most: 2.5 are drawn on average, and rows have to be long enough


@dataclass(frozen=True)
class Brevo(GraphTask):
    """Settings: those of graphs, which nodes are asked for, and sizes evaluated beside N.

    Brevo1, the default, has names of one of N symbols, N = 70, 90 or 110; Brevo2 has names of 2 to
    4 of 4 symbols, N = 30, 40 or 50. Training learns `<ans>` and all behind it, in one right order
    of many, drawn at random.

    `query_from` is `quarter`, any of the last quarter of nodes, as the paper says, or `last`, the
    last node, as its code does. The held-out set `brevo` has n = N, sets `nodes_<n>` other n.
    """

    max_nodes: int = 70
    symbols: int = 70
    min_name: int = 1
    max_name: int = 1
    query_from: str = "quarter"
    other_nodes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.query_from, ("quarter", "last"), "data.task.query_from")
        for nodes in self.other_nodes:
            self.require_nodes("other_nodes", nodes)
            require(
                nodes != self.max_nodes, "data.task.other_nodes", self.other_nodes,
                f"other sizes than data.task.max_nodes = {self.max_nodes}",
            )  # fmt: skip

    @property
    def marks(self) -> tuple[str, ...]:
        return ("<bos>", "<query>", "<ans>")

    @property
    def sources(self) -> tuple[str, ...]:
        return ("brevo",)

    @property
    def heldout_sets(self) -> tuple[str, ...]:
        return ("brevo", *(f"nodes_{nodes}" for nodes in self.other_nodes))

    def heldout_nodes(self, name: str) -> int:
        return self.max_nodes if name == "brevo" else int(name.removeprefix("nodes_"))

    def size(self, nodes: int) -> int:
        return self.max_name * (2 * most_edges(nodes) + nodes + 1) + 4

    def draw(self, rng: random.Random, nodes: int) -> Graph:
        """A random graph: 1 to (n-1)/4 + 1 leaves, then nodes of 1 to 4 parents among the earlier
        ones that have fewer than 4 children.

        One of more than 3n edges is drawn again, fewer than one in a thousand.
        """
        while True:
            edges, children = [], [0] * nodes
            leaves = 1 + below(rng, (nodes - 1) // 4 + 1)
            available = list(range(leaves))
            for child in range(leaves, nodes):
                number = 1 + below(rng, min(MAX_DEGREE, len(available)))
                for parent in sample(rng, available, number):
                    edges.append((parent, child))
                    children[parent] += 1
                available = [node for node in available if children[node] < MAX_DEGREE]
                available.append(child)
            if len(edges) <= most_edges(nodes):
                names = self.draw_names(rng, nodes)
                named = [(names[parent], names[child]) for parent, child in edges]
                return Graph(names, sample(rng, named, len(named)))

    def training_problem(self, rng: random.Random, graph: Graph) -> Document:
        return self._problem(rng, graph, learn_ans=True)

    def heldout_problem(self, rng: random.Random, graph: Graph, name: str) -> Document:
        del name
        return self._problem(rng, graph, learn_ans=False)

    def _problem(self, rng: random.Random, graph: Graph, learn_ans: bool) -> Document:
        nodes = len(graph.nodes)
        first = 3 * nodes // 4 if self.query_from == "quarter" else nodes - 1
        query = graph.nodes[first + below(rng, nodes - first)]
        order = random_order(rng, needed(graph.edges, query))
        bos, query_mark, ans, end = self.encode(["<bos>", "<query>", "<ans>", END]).tolist()
        return self.document([
            (False, [bos, *graph.edge_tokens(), query_mark, *query]),
            (learn_ans, [ans]),
            (True, [*(token for name in order for token in name), end]),
        ])  # fmt: skip

    def is_right(self, name: str, problem: Document, answer: Sequence[int]) -> bool:
        """Whether `answer` lists each node that is needed once, behind its parents, the query last.

        What follows `<eos>` is not read; no `<eos>` at the end is as good as one.
        """
        del name
        edges, query = self._read(problem)
        tokens = list(answer)
        end = self.vocabulary[END]
        names = self.read_names(tokens[: tokens.index(end)] if end in tokens else tokens)
        if not names or names[-1] != query or len(set(names)) < len(names):
            return False
        parents = needed(edges, query)
        place = {node: number for number, node in enumerate(names)}
        return place.keys() == parents.keys() and all(
            place[parent] < place[child] for child in parents for parent in parents[child]
        )

    def chance(self, name: str) -> float:
        """At most this share of a set is right by who knows names, query and how many are needed.

        Such a guess puts others in a random order before the query. With m needed ones of n,
        their set is right once in (n-1 over m-1); the order is right at most as often as in the
        tree in which each node keeps one of its children (one in the product of the sizes of
        subtrees). Means over the set; graphs that are trees reach it.
        """
        nodes = self.heldout_nodes(name)
        shares = []
        for problem in self.heldout(name):
            parents = needed(*self._read(problem))
            below_query = len(parents) - 1
            shares.append(order_chance(parents) / math.comb(nodes - 1, below_query))
        return float(np.mean(shares))

    def _read(self, problem: Document) -> tuple[list[Edge], Name]:
        """The edges and the query of a problem, read from its text."""
        tokens = problem.tokens.tolist()
        mark, ans = tokens.index(self.vocabulary["<query>"]), tokens.index(self.vocabulary["<ans>"])
        names = self.read_names(tokens[1:mark])
        assert names is not None, "a problem's edges are names"
        edges = list(zip(names[::2], names[1::2], strict=True))
        return edges, tuple(tokens[mark + 1 : ans])


def most_edges(nodes: int) -> int:
    """Edges that a graph of so many nodes has at most."""
    return min(EDGES_PER_NODE * nodes, sum(min(MAX_DEGREE, node) for node in range(1, nodes)))


def needed(edges: Iterable[Edge], query: Name) -> dict[Name, list[Name]]:
    """The query and all that it depends on, each with its parents."""
    parents = collections.defaultdict(list)
    for parent, child in edges:
        parents[child].append(parent)
    found, stack = {}, [query]
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = parents[node]
            stack += parents[node]
    return found


def random_order(rng: random.Random, parents: Mapping[Name, Sequence[Name]]) -> list[Name]:
    """All nodes, each after its parents; which of those that may come next is drawn evenly."""
    waiting = {node: len(its_parents) for node, its_parents in parents.items()}
    children = collections.defaultdict(list)
    for node, its_parents in parents.items():
        for parent in its_parents:
            children[parent].append(node)
    ready, order = [node for node, count in waiting.items() if not count], []
    while ready:
        place = below(rng, len(ready))
        ready[place], ready[-1] = ready[-1], ready[place]
        node = ready.pop()
        order.append(node)
        for child in children[node]:
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)
    return order


def order_chance(parents: Mapping[Name, Sequence[Name]]) -> float:
    """A bound on how likely a random order of all nodes with the query last is a right one."""
    order = random_order(random.Random(0), parents)
    sizes = dict.fromkeys(order, 1)
    # The first child of each: the deeper the tree, the closer the bound.
    child_of = {parent: node for node in reversed(order) for parent in parents[node]}
    probability = 1.0
    for node in order[:-1]:
        probability /= sizes[node]
        sizes[child_of[node]] += sizes[node]
    return probability
