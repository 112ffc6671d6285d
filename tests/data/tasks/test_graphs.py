"""What Depo and Brevo share: names, sizes, rows, and graphs held out."""

import collections
import dataclasses

import numpy as np
import pytest
from scipy.stats import chisquare

from ouro_jax.data.tasks.brevo import Brevo
from ouro_jax.data.tasks.depo import Depo
from ouro_jax.data.tasks.graphs import sample
from ouro_jax.errors import ConfigError

DEPO = Depo(max_nodes=10, symbols=12, max_name=1, max_hops=4, queries=4, heldout_problems=50)
BREVO = Brevo(max_nodes=8, symbols=4, min_name=2, max_name=4, heldout_problems=50)
# (settings, the paper's context)
PAPER = [
    (Depo(max_nodes=375), 2048),
    (Depo(max_nodes=125, symbols=4, min_name=5, max_name=7, max_hops=16), 2048),
    (Brevo(max_nodes=110, symbols=110), 1024),
    (Brevo(max_nodes=50, symbols=4, min_name=2, max_name=4), 1536),
]


def edge_text(task, document):
    """The tokens of a problem's edges."""
    tokens = document.tokens.tolist()
    marks = {task.vocabulary[word] for word in task.marks if word.startswith("<query")}
    return tokens[1 : next(place for place, token in enumerate(tokens) if token in marks)]


def graph_of(task, document):
    """A problem's edges, as text, in one order."""
    names = read(task, edge_text(task, document))
    return tuple(sorted(zip(names[::2], names[1::2], strict=True)))


def read(task, tokens):
    """Names, by splitting behind the tokens above V."""
    text = "".join(f"{token}{';' if token > task.symbols else ','}" for token in tokens)
    return text.removesuffix(";").split(";")


def test_sizes_have_the_stated_distribution_over_all_problems():
    task, counts = DEPO, collections.Counter()
    # Rows of 130 tokens hold up to seven small problems, and one or two of the largest.
    for index in range(3000):
        documents = task.documents("depo", index, 130)
        nodes = {len(graph_of(task, document)) for document in documents}
        assert len(nodes) == 1
        counts[nodes.pop()] += len(documents)
    sizes = np.arange(3, task.max_nodes + 1)
    stated = 1 / (sizes + np.sqrt(task.max_nodes))
    seen = np.array([counts[size] for size in sizes])
    assert seen.sum() == counts.total()
    # Problems of a row have one size, so the counts of rows are what is independent.
    per_row = np.array([130 // task.size(size) for size in sizes])
    rows, expected = seen / per_row, stated / per_row
    assert chisquare(rows, expected / expected.sum() * rows.sum()).pvalue > 0.01
    assert np.abs(seen / seen.sum() / (stated / stated.sum()) - 1).max() < 0.2


@pytest.mark.parametrize(("task", "sequence_length"), PAPER)
def test_rows_of_the_paper_hold_their_problems(task, sequence_length):
    assert task.longest() <= sequence_length
    for index in range(20):
        documents = task.documents(task.sources[0], index, sequence_length)
        assert documents
        assert sum(len(document.tokens) for document in documents) <= sequence_length
        for document in documents:
            assert len(document.tokens) == len(document.loss_mask) <= task.longest()


def test_names_are_different_and_end_visibly():
    rng, lengths = BREVO.random("names"), collections.Counter()
    for _ in range(500):
        names = BREVO.draw_names(rng, 3)
        assert len(set(names)) == 3
        for *head, last in names:
            assert all(1 <= token <= 4 for token in head) and 5 <= last <= 8
            lengths[len(head) + 1] += 1
        spelt = [token for name in names for token in name]
        assert BREVO.read_names(spelt) == names
        assert BREVO.read_names(spelt[:-1]) is None  # no end
        assert BREVO.read_names([*spelt, BREVO.vocabulary["<ans>"]]) is None
    # Three of 16 short names are rarely the same, so lengths are all but uniform.
    assert chisquare([lengths[length] for length in (2, 3, 4)]).pvalue > 0.001
    assert BREVO.vocabulary["7"] == 7  # the id of a symbol is its number


def test_names_run_out_only_when_all_are_taken():
    task = Depo(max_nodes=6, symbols=2, max_name=2, max_hops=2, heldout_problems=1)
    names = task.draw_names(task.random("all"), 6)
    assert len(set(names)) == 6
    firsts = collections.Counter(
        len(task.draw_names(task.random(number), 6)[0]) for number in range(600)
    )
    # In a random order, whatever was drawn first: two of six names are short.
    assert abs(firsts[1] - 200) < 4 * np.sqrt(600 * 2 / 9)


def test_samples_are_uniform_and_without_repetition():
    rng, counts = DEPO.random("sample"), collections.Counter()
    for _ in range(6000):
        counts[tuple(sample(rng, "abcd", 2))] += 1
    assert len(counts) == 12 and all(a != b for a, b in counts)
    assert chisquare(list(counts.values())).pvalue > 0.001


@pytest.mark.parametrize(
    "task",
    [
        # So few graphs (144 cycles) that training without the split would meet those held out.
        Depo(max_nodes=5, symbols=6, max_name=1, max_hops=2, queries=1, heldout_problems=3),
        Brevo(max_nodes=4, symbols=4, other_nodes=(3,), heldout_problems=3),
    ],
)
def test_held_out_graphs_never_occur_in_training(task):
    source, length = task.sources[0], task.longest()
    heldout = {graph_of(task, document) for name in task.heldout_sets
               for document in task.heldout(name)}  # fmt: skip
    assert len(heldout) >= 3
    trained = collections.Counter(
        graph_of(task, document)
        for index in range(2500)
        for document in task.documents(source, index, length)
    )
    assert not trained.keys() & heldout
    assert np.median(list(trained.values())) > 2


def test_problems_follow_from_the_row_and_the_seed():
    first, again = (DEPO.documents("depo", 7, 100) for _ in range(2))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    others = (
        DEPO.documents("depo", 8, 100),
        dataclasses.replace(DEPO, seed=1).documents("depo", 7, 100),
    )
    assert all(first[0].tokens.tolist() != other[0].tokens.tolist() for other in others)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_nodes": 2}, "max_nodes = 2: expected 3 to 2550"),
        ({"max_nodes": 13, "symbols": 12, "max_name": 1}, "max_nodes = 13: expected 3 to 12"),
        ({"symbols": 0}, "symbols"),
        ({"min_name": 0}, "min_name"),
        ({"min_name": 3}, "max_name = 2: expected at least data.task.min_name = 3"),
        ({"heldout_problems": 0}, "heldout_problems"),
    ],
)
def test_wrong_settings(settings, says):
    with pytest.raises(ConfigError, match=says):
        Depo(**settings)


def test_too_few_graphs_to_hold_out():
    task = Depo(max_nodes=4, symbols=4, max_name=1, max_hops=2, heldout_problems=50)
    with pytest.raises(ConfigError, match="different graphs of 4 nodes to hold out"):
        task.heldout("depo")
