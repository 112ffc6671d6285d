"""Depo: the k-th successor on a cycle that the problem shows edge by edge, in a random order.

A problem is `<bos> a b … <query_k> x <ans> y …` (Physics of Language Models 4.1): the n edges of a
cycle through all n nodes, each a name and the next one's, then queries of different nodes, each
with its k and the node k steps behind it. k is uniform in 1 … K.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ouro_jax.data.packing import Document
from ouro_jax.data.tasks.graphs import Graph, GraphTask, sample
from ouro_jax.data.tasks.task import below
from ouro_jax.errors import require


@dataclass(frozen=True)
class Depo(GraphTask):
    """Settings: those of graphs, K, the queries of a problem, and hops evaluated beside K and K/2.

    Depo1, the default, has names of 1 to 2 of 50 symbols, N = 225, 300 or 375 and K = 8; Depo2 has
    names of 5 to 7 of 4 symbols, N = 75, 100 or 125 and K = 16. Training learns `<ans>` and the
    answers.

    All held-out sets have n = N: `depo` has k = K, `hops_<k>` another k, K/2 always among them. A
    held-out problem has one query, so that problems are independent of each other and no right
    answer of an earlier query stands in the text.
    """

    max_hops: int = 8
    queries: int = 10
    other_hops: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        # N steps lead back to the queried node itself.
        require(
            1 <= self.max_hops < self.max_nodes, "data.task.max_hops", self.max_hops,
            f"at least 1 and below data.task.max_nodes = {self.max_nodes}",
        )  # fmt: skip
        require(self.queries >= 1, "data.task.queries", self.queries, "at least 1")
        for hops in self.other_hops:
            require(
                1 <= hops < self.max_hops and hops != self.max_hops // 2, "data.task.other_hops",
                self.other_hops, f"hops from 1 to {self.max_hops - 1} but for "
                f"{self.max_hops // 2}, which is evaluated anyway",
            )  # fmt: skip

    @property
    def marks(self) -> tuple[str, ...]:
        return ("<bos>", "<ans>", *(f"<query_{hops}>" for hops in range(1, self.max_hops + 1)))

    @property
    def sources(self) -> tuple[str, ...]:
        return ("depo",)

    @property
    def heldout_sets(self) -> tuple[str, ...]:
        half = (self.max_hops // 2,) if self.max_hops > 1 else ()
        return ("depo", *(f"hops_{hops}" for hops in (*half, *self.other_hops)))

    def size(self, nodes: int) -> int:
        query = 2 + 2 * self.max_name
        return 1 + 2 * nodes * self.max_name + min(self.queries, nodes) * query

    def draw(self, rng: random.Random, nodes: int) -> Graph:
        """A cycle; its nodes are in the order of the cycle."""
        cycle = self.draw_names(rng, nodes)
        edges = list(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        return Graph(cycle, sample(rng, edges, nodes))

    def training_problem(self, rng: random.Random, graph: Graph) -> Document:
        nodes = len(graph.nodes)
        queried = sample(rng, range(nodes), min(self.queries, nodes))
        queries = [(start, 1 + below(rng, self.max_hops)) for start in queried]
        return self.document(self._parts(graph, queries, learn_ans=True))

    def heldout_problem(self, rng: random.Random, graph: Graph, name: str) -> Document:
        hops = self.max_hops if name == "depo" else int(name.removeprefix("hops_"))
        queries = [(below(rng, len(graph.nodes)), hops)]
        return self.document(self._parts(graph, queries, learn_ans=False))

    def chance(self, name: str) -> float:
        """1/(N-1), exactly: any other node than the queried one, by who knows all names, no edge.

        Who does not know the names either is right less often.
        """
        del name
        return 1 / (self.max_nodes - 1)

    def _parts(
        self, graph: Graph, queries: Sequence[tuple[int, int]], learn_ans: bool
    ) -> Iterator[tuple[bool, Sequence[int]]]:
        yield False, [self.vocabulary["<bos>"], *graph.edge_tokens()]
        for start, hops in queries:
            yield False, [self.vocabulary[f"<query_{hops}>"], *graph.nodes[start]]
            yield learn_ans, [self.vocabulary["<ans>"]]
            yield True, graph.nodes[(start + hops) % len(graph.nodes)]
