"""The order in which several sources give their rows: a formula of the row's number.

Which source gives a row, and how many each has given before it, follow from the row's number and
the shares alone, in exact integers: nothing is stored, so any position is reached at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Shares are kept in parts per 2^30. Grain's own `mix` rounds a share down to a hundredth of the
# smallest one, which is wrong by up to 0.25 percentage points.
SHARE_UNIT = 1 << 30


@dataclass(frozen=True)
class Interleave:
    """Rows drawn from sources by `weights`, less the spans of `skip_rows`.

    The rows are numbered before skipping; a span [start, stop) of them is never given. Spans are
    sorted and disjoint. What is asked for below is counted after skipping: row 5 is the sixth
    one that is given. Sources of weight 0 are left out.
    """

    weights: Mapping[str, float]
    skip_rows: tuple[tuple[int, int], ...] = ()

    def locate(self, row: int) -> tuple[str, int]:
        """The source that gives `row`, and how many rows it had drawn before."""
        index, remaining = self.passed(row + 1) - 1, self._total
        for source, share in self._shares.items():
            before = index * (remaining - share) // remaining
            after = (index + 1) * (remaining - share) // remaining
            if before == after:
                return source, index - before
            index, remaining = before, remaining - share
        raise AssertionError("the last source takes every row that is left")

    def passed(self, num_rows: int) -> int:
        """How many rows are behind once `num_rows` were given: those and the skipped ones."""
        last = num_rows - 1
        for start, stop in self.skip_rows:
            if last < start:
                break
            last += stop - start
        return last + 1

    def drawn(self, num_rows: int) -> dict[str, int]:
        """Rows of each source that are behind once `num_rows` were given, the skipped included."""
        return self._first(self.passed(num_rows))

    def given(self, num_rows: int) -> dict[str, int]:
        """Rows of each source among the first `num_rows` given; they sum to `num_rows`."""
        passed = self.passed(num_rows)
        given = self._first(passed)
        for start, stop in self.skip_rows:
            if start >= passed:
                break
            before, after = self._first(start), self._first(stop)
            given = {source: n - (after[source] - before[source]) for source, n in given.items()}
        return given

    def _first(self, num_rows: int) -> dict[str, int]:
        """Rows of each source among the first `num_rows`, nothing skipped.

        ⌈k·p/R⌉ of k rows come from a source with share p of R. A row that the first source does
        not give is row ⌊k·(R−p)/R⌋ of what the others give among themselves.
        """
        counts, remaining = {}, self._total
        for source, share in self._shares.items():
            others = num_rows * (remaining - share) // remaining
            counts[source] = num_rows - others
            num_rows, remaining = others, remaining - share
        return counts

    @cached_property
    def _shares(self) -> dict[str, int]:
        """Parts of `SHARE_UNIT`, rounded so that no rounding adds up and none is 0."""
        weights = {source: weight for source, weight in self.weights.items() if weight > 0}
        total = sum(weights.values())
        cumulated = np.cumsum([0.0, *weights.values()]) / total
        borders = np.rint(cumulated * SHARE_UNIT).astype(int).tolist()
        sizes = [max(1, end - start) for start, end in zip(borders[:-1], borders[1:], strict=True)]
        return dict(zip(weights, sizes, strict=True))

    @cached_property
    def _total(self) -> int:
        return sum(self._shares.values())
