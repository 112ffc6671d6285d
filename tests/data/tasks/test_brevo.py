"""Brevo against its definition, with a checker of its own that reads the text."""

import collections
import itertools
import random

import numpy as np
import pytest
from scipy.stats import chisquare

from ouro_jax.data.tasks.brevo import Brevo, needed, order_chance, random_order
from ouro_jax.errors import ConfigError

SMALL = Brevo(max_nodes=9, symbols=12, heldout_problems=100, other_nodes=(5, 12))
BREVO2 = Brevo(max_nodes=30, symbols=4, min_name=2, max_name=4, heldout_problems=20)
PAPER = Brevo(heldout_problems=5)


def split(task, tokens):
    """Names as strings."""
    names, name = [], ""
    for token in tokens:
        assert 1 <= token <= 2 * task.symbols
        name += f"{token} "
        if token > task.symbols:
            names.append(name)
            name = ""
    assert not name
    return names


def parse(task, document):
    """The edges, the query and the answer of a problem, by names."""
    tokens = document.tokens.tolist()
    marks = [task.vocabulary[word] for word in ("<bos>", "<query>", "<ans>", "<eos>")]
    bos, query, ans, eos = (tokens.index(mark) for mark in marks)
    assert bos == 0 and eos == len(tokens) - 1
    names = split(task, tokens[1:query])
    (asked,) = split(task, tokens[query + 1 : ans])
    edges = list(zip(names[::2], names[1::2], strict=True))
    return edges, asked, split(task, tokens[ans + 1 : eos])


def solves(edges, query, answer):
    """Whether `answer` is right, by a fixed point and by comparing every edge."""
    reached = {query}
    while more := {a for a, b in edges if b in reached} - reached:
        reached |= more
    return (
        sorted(answer) == sorted(reached)
        and answer[-1] == query
        and all(
            answer.index(a) < answer.index(b) for a, b in edges if a in reached and b in reached
        )
    )


def problems(task, rows, sequence_length):
    return [
        document for index in range(rows)
        for document in task.documents("brevo", index, sequence_length)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "rows", "length"), [(SMALL, 300, 130), (BREVO2, 40, 900), (PAPER, 10, 1024)]
)
def test_answers_are_right_orders_of_graphs_as_defined(task, rows, length):
    for document in problems(task, rows, length) + task.heldout("brevo"):
        edges, query, answer = parse(task, document)
        assert len(set(edges)) == len(edges)
        assert solves(edges, query, answer)
        assert max(collections.Counter(parent for parent, _ in edges).values()) <= 4
        degrees = collections.Counter(child for _, child in edges)
        assert max(degrees.values()) <= 4
        assert degrees[query] >= 1
        # No cycle anywhere: taking away what has no parents left ends with nothing.
        left = list(edges)
        while left:
            children = {child for _, child in left}
            rest = [(parent, child) for parent, child in left if parent in children]
            assert len(rest) < len(left)
            left = rest


def test_leaves_and_parents_are_uniform():
    task, rng = Brevo(max_nodes=13, symbols=13), random.Random(0)
    leaves, parents = collections.Counter(), collections.Counter()
    for _ in range(2000):
        graph = task.draw(rng, 13)
        degrees = collections.Counter(child for _, child in graph.edges)
        leaves[13 - len(degrees)] += 1
        # Nodes are in the order in which they were made; the last one has enough to choose from.
        parents[degrees[graph.nodes[-1]]] += 1
    assert set(leaves) == {1, 2, 3, 4} and chisquare(list(leaves.values())).pvalue > 0.001
    assert set(parents) == {1, 2, 3, 4} and chisquare(list(parents.values())).pvalue > 0.001


def test_queries_come_from_the_last_quarter_or_are_the_last_node():
    for query_from, expected in (("quarter", {9, 10, 11}), ("last", {11})):
        task, rng = Brevo(max_nodes=12, symbols=12, query_from=query_from), random.Random(1)
        seen = set()
        for _ in range(100):
            graph = task.draw(rng, 12)
            document = task.training_problem(rng, graph)
            tokens = document.tokens.tolist()
            place = tokens.index(task.vocabulary["<query>"])
            seen.add(graph.nodes.index((tokens[place + 1],)))
        assert seen == expected


def test_ties_are_broken_evenly():
    parents = {"c": ["a", "b"], "a": [], "b": []}
    rng = random.Random(2)
    firsts = collections.Counter("".join(random_order(rng, parents)) for _ in range(1000))
    assert set(firsts) == {"abc", "bac"} and chisquare(list(firsts.values())).pvalue > 0.001


def test_every_order_is_judged_as_by_the_definition():
    task = Brevo(max_nodes=5, symbols=6, heldout_problems=12)
    rights = 0
    for document in task.heldout("brevo"):
        edges, query, _ = parse(task, document)
        names = sorted({name for edge in edges for name in edge} | {"7 "})
        for length in range(len(names) + 1):
            for order in itertools.permutations(names, length):
                answer = [int(name) for name in order]
                right = bool(order) and solves(edges, query, list(order))
                assert task.is_right("brevo", document, [*answer, 0]) == right
                assert task.is_right("brevo", document, answer) == right
                rights += right
    assert rights > 12  # several right orders of one problem


def test_what_is_no_list_of_names_is_wrong():
    task = BREVO2
    for document in task.heldout("brevo"):
        answer = document.tokens[document.loss_mask].tolist()
        assert answer[-1] == 0 and task.is_right("brevo", document, answer)
        assert task.is_right("brevo", document, [*answer, 3, 3])  # behind <eos>
        ans = task.vocabulary["<ans>"]
        for wrong in ([], [0], answer[:-2], [1, *answer], [ans, *answer], [*answer[:-1], 1],
                      answer[:-1] * 2):  # fmt: skip
            assert not task.is_right("brevo", document, wrong)


def test_masks_and_sizes_of_sets():
    assert SMALL.heldout_sets == ("brevo", "nodes_5", "nodes_12")
    assert SMALL.longest() == SMALL.size(12)
    for document in SMALL.heldout("nodes_12"):
        ans = document.tokens.tolist().index(SMALL.vocabulary["<ans>"])
        assert not document.loss_mask[: ans + 1].any() and document.loss_mask[ans + 1 :].all()
    for document in problems(SMALL, 20, 130):
        ans = document.tokens.tolist().index(SMALL.vocabulary["<ans>"])
        assert not document.loss_mask[:ans].any() and document.loss_mask[ans:].all()


def test_chance_bounds_random_guesses_of_the_right_length():
    task = Brevo(max_nodes=5, symbols=8, heldout_problems=100)
    documents, exact = task.heldout("brevo"), []
    rng, hits = random.Random(3), 0
    for document in documents:
        edges, query, answer = parse(task, document)
        # All five nodes have names; a leaf without children is in no edge.
        others = sorted({name for edge in edges for name in edge} - {query})
        others += ["absent"] * (4 - len(others))
        guesses = list(itertools.permutations(others, len(answer) - 1))
        right = [guess for guess in guesses if solves(edges, query, [*guess, query])]
        exact.append(len(right) / len(guesses))
        for _ in range(20):
            guess = rng.sample(others, len(answer) - 1)
            hits += solves(edges, query, [*guess, query])
    chance = task.chance("brevo")
    assert np.mean(exact) <= chance < 1.2 * np.mean(exact)
    assert abs(hits / (20 * len(documents)) - np.mean(exact)) < 4 * np.sqrt(chance / 2000)
    assert PAPER.chance("brevo") < 1e-3


def test_chance_is_exact_where_the_graph_is_a_tree():
    tree = {"q": ["a", "b"], "a": ["c", "d"], "b": [], "c": [], "d": []}
    orders = list(itertools.permutations("abcd"))
    right = sum(order.index("c") < order.index("a") > order.index("d") for order in orders)
    assert order_chance(tree) == pytest.approx(right / len(orders))  # type: ignore[arg-type]


def test_needed_nodes_are_all_ancestors():
    edges = [("a", "b"), ("b", "c"), ("a", "c"), ("d", "e")]
    assert needed(edges, "c") == {"c": ["b", "a"], "b": ["a"], "a": []}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_nodes": 80}, "max_nodes = 80: expected 3 to 70"),
        ({"query_from": "lst"}, "Did you mean 'last'"),
        ({"other_nodes": (71,)}, "other_nodes = 71: expected 3 to 70"),
        ({"other_nodes": (70,)}, "other_nodes"),
    ],
)
def test_wrong_settings(settings, says):
    with pytest.raises(ConfigError, match=says):
        Brevo(**settings)
