"""Depo against its definition: the cycle is followed edge by edge, from the text alone."""

import collections
import dataclasses

import numpy as np
import pytest
from scipy.stats import chisquare

from ouro_jax.data.tasks.depo import Depo
from ouro_jax.errors import ConfigError

SMALL = Depo(max_nodes=9, symbols=20, max_name=2, max_hops=4, queries=4, other_hops=(1,))
DEPO2 = Depo(max_nodes=30, symbols=4, min_name=5, max_name=7, max_hops=16)
PAPER = Depo()


def text_of(task, tokens):
    """The problem as its words, a name joined by dots: `<bos> 3.25 27 … <query_2> 27 <ans> …`."""
    words = {number: word for word, number in task.vocabulary.items()}
    parts, name = [], []
    for token in tokens.tolist():
        if words[token].startswith("<"):
            assert not name
            parts.append(words[token])
        else:
            name.append(words[token])
            if int(words[token]) > task.symbols:
                parts.append(".".join(name))
                name = []
    assert not name
    return parts


def parse(task, document):
    """The edges (a dictionary) and the queries (hops, node, answer) of a problem."""
    bos, *parts = text_of(task, document.tokens)
    assert bos == "<bos>"
    start = next(place for place, part in enumerate(parts) if part.startswith("<query"))
    names, rest = parts[:start], parts[start:]
    edges = dict(zip(names[::2], names[1::2], strict=True))
    assert len(edges) == len(names) // 2 == len(set(edges.values()))
    queries = []
    for query, node, ans, answer in zip(*(rest[place::4] for place in range(4)), strict=True):
        assert ans == "<ans>"
        queries.append((int(query.removeprefix("<query_").removesuffix(">")), node, answer))
    return edges, queries


def problems(task, rows, sequence_length):
    return [
        document for index in range(rows)
        for document in task.documents("depo", index, sequence_length)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "rows", "length"), [(SMALL, 300, 80), (DEPO2, 30, 700), (PAPER, 10, 2048)]
)
def test_answers_are_found_by_following_edges(task, rows, length):
    for document in problems(task, rows, length):
        edges, queries = parse(task, document)
        node = first = next(iter(edges))
        visited = [node]
        while (node := edges[node]) != first:
            visited.append(node)
        assert set(visited) == set(edges)  # one cycle through all nodes
        assert len(queries) == min(task.queries, len(edges))
        assert len({start for _, start, _ in queries}) == len(queries)
        for hops, start, answer in queries:
            node = start
            for _ in range(hops):
                node = edges[node]
            assert answer == node


def test_hops_are_uniform_and_cycles_and_orders_too():
    task = Depo(max_nodes=4, symbols=4, max_name=1, max_hops=3, queries=2, heldout_problems=1)
    hops, cycles, firsts = (collections.Counter() for _ in range(3))
    for index in range(4000):
        edges, queries = parse(task, task.documents("depo", index, task.longest())[0])
        hops.update(number for number, _, _ in queries)
        if len(edges) == 3 and "5" in edges and "6" in edges and "7" in edges:
            cycles[edges["5"]] += 1
            firsts[next(iter(edges))] += 1
    assert set(hops) == {1, 2, 3} and chisquare(list(hops.values())).pvalue > 0.001
    assert set(cycles) == {"6", "7"} and chisquare(list(cycles.values())).pvalue > 0.001
    assert set(firsts) == {"5", "6", "7"} and chisquare(list(firsts.values())).pvalue > 0.001


def test_held_out_problems_have_all_nodes_and_one_query():
    assert SMALL.heldout_sets == ("depo", "hops_2", "hops_1")
    for name, hops in zip(SMALL.heldout_sets, (4, 2, 1), strict=True):
        documents = dataclasses.replace(SMALL, heldout_problems=60).heldout(name)
        assert len(documents) == 60
        for document in documents:
            edges, [(seen, start, answer)] = parse(SMALL, document)
            assert (len(edges), seen) == (9, hops) and start != answer
            marked = document.tokens[document.loss_mask]
            assert text_of(SMALL, marked) == [answer]
            assert document.loss_mask[-1]


def test_training_learns_the_answers_and_their_mark():
    for document in problems(SMALL, 20, 80):
        _, queries = parse(SMALL, document)
        learnt = text_of(SMALL, document.tokens[document.loss_mask])
        assert learnt == [part for _, _, answer in queries for part in ("<ans>", answer)]


def test_chance_is_that_of_another_name():
    rng, hits, task = np.random.default_rng(0), 0, dataclasses.replace(SMALL, heldout_problems=300)
    documents = task.heldout("depo")
    for document in documents:
        edges, [(_, start, answer)] = parse(task, document)
        others = [node for node in edges if node != start]
        hits += sum(others[place] == answer for place in rng.integers(len(others), size=20))
    trials = 20 * len(documents)
    chance = task.chance("depo")
    assert chance == 1 / 8
    assert abs(hits / trials - chance) < 4 * np.sqrt(chance / trials)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_hops": 0}, "max_hops = 0: expected at least 1 and below"),
        ({"max_hops": 225}, "max_hops = 225: expected at least 1 and below"),
        ({"queries": 0}, "queries"),
        ({"other_hops": (8,)}, "other_hops = .8,.: expected hops from 1 to 7 but for 4"),
        ({"other_hops": (4,)}, "other_hops"),
    ],
)
def test_wrong_settings(settings, says):
    with pytest.raises(ConfigError, match=says):
        Depo(**settings)
