"""Which source gives which row: exact shares, nothing lost, counts in closed form."""

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ouro_jax.data.interleave import Interleave

WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=7).map(
    lambda parts: {f"s{i}": part / sum(parts) for i, part in enumerate(parts)}
)
# Gaps and lengths of spans, one after the other; a gap of 0 makes two that touch.
SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), max_size=4)


def spans_of(steps: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    spans, end = [], 0
    for gap, length in steps:
        spans.append((end + gap, end + gap + length))
        end += gap + length
    return tuple(spans)


@settings(deadline=None, max_examples=60)
@given(weights=WEIGHTS, steps=SPANS)
def test_counts_and_places_are_those_of_walking_the_rows(weights, steps):
    spans = spans_of(steps)
    whole, order = Interleave(weights), Interleave(weights, spans)
    rows = [whole.locate(row) for row in range(400)]
    kept = [
        (row, place) for row, place in enumerate(rows)
        if not any(start <= row < stop for start, stop in spans)
    ]  # fmt: skip
    assert [order.locate(row) for row in range(len(kept))] == [place for _, place in kept]
    zero = dict.fromkeys(weights, 0)
    assert order.drawn(0) == order.given(0) == zero and order.passed(0) == 0
    for num_rows in range(1, len(kept) + 1):
        behind = kept[num_rows - 1][0] + 1
        assert order.passed(num_rows) == behind
        assert order.drawn(num_rows) == zero | Counter(source for source, _ in rows[:behind])
        sources = Counter(source for _, (source, _) in kept[:num_rows])
        assert order.given(num_rows) == zero | sources
    for source in weights:
        assert [n for name, n in rows if name == source] == list(range(whole.drawn(400)[source]))


def test_a_span_by_hand():
    order = Interleave({"a": 0.5, "b": 0.5}, ((2, 5), (5, 6), (10, 20)))
    # Rows 0 1 6 7 8 9 20 …: a gives the even ones.
    assert [order.locate(row) for row in range(7)] == [
        ("a", 0), ("b", 0), ("a", 3), ("b", 3), ("a", 4), ("b", 4), ("a", 10),
    ]  # fmt: skip
    assert [order.passed(n) for n in (1, 2, 3, 6, 7)] == [1, 2, 7, 10, 21]
    assert (order.drawn(6), order.given(6)) == ({"a": 5, "b": 5}, {"a": 3, "b": 3})


@pytest.mark.parametrize("shares", [
    {"a": 0.734, "b": 0.13, "c": 0.02, "d": 0.075, "e": 0.041},
    {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
    {"a": 0.25, "b": 0.25 + 1e-4, "c": 0.25 - 1e-4, "d": 0.25},
    {"a": 1 - 2e-6, "b": 1e-6, "c": 1e-6},
])  # fmt: skip
def test_observed_shares_of_a_million_rows(shares):
    """Counted row by row; the goal is 0.1 percentage points, the formula is a row or two off."""
    order = Interleave(shares)
    seen = dict.fromkeys(shares, 0)
    for row in range(1_000_000):
        source, index = order.locate(row)
        assert index == seen[source]
        seen[source] += 1
    assert seen == order.given(1_000_000)
    for source, share in shares.items():
        assert abs(seen[source] / 1_000_000 - share) < 1e-5


def test_no_source_is_late_by_more_than_a_few_rows():
    """Shares hold wherever one counts, not only in the end."""
    shares = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    order = Interleave(shares)
    for num_rows in (1, 7, 100, 12_345, 10**6 + 1, 10**10 + 3, 7 * 10**12):
        for source, count in order.given(num_rows).items():
            assert abs(count - num_rows * shares[source]) < len(shares) + num_rows * 2**-29


def test_any_number_costs_the_same():
    order = Interleave({f"s{i}": 1 / 20 for i in range(20)}, ((10**12, 10**12 + 5),))
    start = time.perf_counter()
    for row in range(10**15, 10**15 + 1000):
        order.locate(row)
        order.given(row)
    assert time.perf_counter() - start < 2


def test_a_source_without_weight_gives_nothing():
    order = Interleave({"a": 0.0, "b": 1.0})
    assert order.locate(3) == ("b", 3) and order.given(3) == {"b": 3}
