"""Figures and tables about prepared data: how long documents are, and what a mixture gives.

`ouro data inspect DIR --plot=FILE` draws `draw_rows(sample_rows(open_rows(DIR)))`;
`ouro data inspect --config=… --stage=…` prints `shares_table(mixture_shares(…))`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.table import Table

from ouro_jax.data.mixture import Mixture
from ouro_jax.data.rows import Manifest, RowSource
from ouro_jax.errors import ConfigError
from ouro_jax.reporting.history import short_count
from ouro_jax.reporting.plots import STAND_INS, STYLE, WIDE
from ouro_jax.reporting.style import CSS

# Few enough to read in seconds; 10,000 rows of 4,096 tokens hold tens of thousands of documents.
SAMPLE_ROWS, SAMPLE_TOKENS = 10_000, 1 << 27
BINS_PER_DOUBLING = 2
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class RowSample:
    """What was found in some rows of a folder, evenly spread over it.

    `lengths`: tokens of every document in them, of a cut document those of its pieces;
    `per_row` [rows]: documents in each row; `learnt` [rows]: the share of each row's tokens that
    carry loss, None where all do.
    """

    manifest: Manifest
    lengths: np.ndarray
    per_row: np.ndarray
    learnt: np.ndarray | None

    @property
    def padding_share(self) -> float:
        """The share of token places that hold no token."""
        return 1 - self.lengths.sum() / (len(self.per_row) * self.manifest.sequence_length)

    def describe(self) -> dict[str, Any]:
        """The sample in a few numbers, for people and for JSON."""
        return {
            "rows": len(self.per_row),
            "documents": len(self.lengths),
            "median_length": float(np.median(self.lengths)),
            "longest": int(self.lengths.max()),
            "documents_per_row": float(self.per_row.mean()),
            "padding_share": float(self.padding_share),
            "learnt_share": None if self.learnt is None else float(self.learnt.mean()),
        }


def sample_rows(rows: RowSource, max_rows: int = SAMPLE_ROWS) -> RowSample:
    """Reads at most `max_rows` rows, fewer if they are very long, evenly spread over `rows`."""
    length = rows.manifest.sequence_length
    count = min(len(rows), max_rows, max(1, SAMPLE_TOKENS // length))
    lengths, learnt = [], []
    for index in range(count):
        row = rows[index * len(rows) // count]
        lengths.append(row.segment_lengths)
        if row.loss_mask is not None:
            learnt.append(row.loss_mask.sum() / row.segment_lengths.sum())
    return RowSample(
        manifest=rows.manifest,
        lengths=np.concatenate(lengths).astype(np.int64),
        per_row=np.array([len(of_row) for of_row in lengths]),
        learnt=np.array(learnt) if learnt else None,
    )


def draw_rows(sample: RowSample, path: str | os.PathLike) -> Path:
    """Draws a sample into a new PNG, SVG or PDF, as the suffix of `path` says; returns the path.

    Panels: lengths of documents (by number and by tokens), documents per row, and where a loss
    mask is stored the share of learnt tokens per row. ConfigError for any other suffix.
    """
    path = Path(path)
    if path.suffix not in PLOT_SUFFIXES:
        raise ConfigError(f"plot = {str(path)!r}: expected a name in {', '.join(PLOT_SUFFIXES)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = light_colours()
    real = {STAND_INS[name]: colour for name, colour in colours.items() if name in STAND_INS}
    with matplotlib.rc_context({key: real.get(value, value) for key, value in STYLE.items()}):
        figure = WIDE.figure(600)
        figure.set_facecolor(colours["paper"])
        figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.12)
        second = "per_row" if sample.learnt is None else "learnt"
        panels = figure.subplot_mosaic([["lengths", "lengths"], ["per_row", second]])
        _lengths(panels["lengths"], sample, colours)
        _documents_per_row(panels["per_row"], sample, colours)
        if sample.learnt is not None:
            _learnt(panels["learnt"], sample.learnt, colours)
        figure.suptitle(_title(sample), x=0.015, ha="left", fontsize=13, color=colours["ink"])
        figure.savefig(path, dpi=144)
    return path


def light_colours() -> dict[str, str]:
    """The colours of the report's light theme by name, as its style sheet has them."""
    return dict(re.findall(r"--([\w-]+): (#\w{6})", CSS.partition("@media")[0]))


def _title(sample: RowSample) -> str:
    manifest, seen = sample.manifest, len(sample.per_row)
    which = "all" if seen == manifest.rows else f"{seen:,}, evenly spread, of"
    lines = [
        f"{manifest.source}: {which} {manifest.rows:,} rows of {manifest.sequence_length:,} tokens",
        f"{len(sample.lengths):,} documents and pieces of cut ones, "
        f"{np.median(sample.lengths):,.0f} tokens in the median · "
        f"padding {sample.padding_share:.2%}",
    ]
    if sample.learnt is not None:
        lines[1] += f" · {sample.learnt.mean():.1%} of the tokens carry loss"
    return "\n".join(lines)


def _lengths(axes: Axes, sample: RowSample, colours: dict[str, str]) -> None:
    """Two histograms over logarithmic lengths: of the documents, and of their tokens."""
    row_length = sample.manifest.sequence_length
    doublings = np.arange(0, np.log2(row_length) + 1e-9, 1 / BINS_PER_DOUBLING)
    # Rounded to whole lengths; the last bin holds what fills a row alone.
    edges = np.unique([*np.ceil(2.0**doublings), row_length, row_length + 1])
    documents, _ = np.histogram(sample.lengths, edges)
    tokens, _ = np.histogram(sample.lengths, edges, weights=sample.lengths)
    places = np.arange(len(edges) - 1)
    axes.bar(
        places - 0.2, documents / documents.sum(), 0.4, color=colours["accent"], label="documents"
    )
    axes.bar(
        places + 0.2, tokens / tokens.sum(), 0.4, color=colours["loop-1"], label="their tokens"
    )
    ticks = [place for place in places if np.log2(edges[place]) % 2 == 0 or place == places[-1]]
    labels = [f"{int(edges[place]):,}" for place in ticks[:-1]] + ["a whole row"]
    axes.set_xticks(ticks, labels)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("share")
    axes.set_xlabel("tokens of a document, or of a piece of one that was cut")
    axes.legend(loc="upper left")


def _documents_per_row(axes: Axes, sample: RowSample, colours: dict[str, str]) -> None:
    """A histogram over 1, 2, 3 to 4, 5 to 8, 9 to 16 … documents."""
    doublings = np.ceil(np.log2(sample.per_row)).astype(int)
    counts = np.bincount(doublings)
    names = ["1", "2", *(f"≤ {2**n:,}" for n in range(2, len(counts)))]
    places = np.arange(len(counts))
    axes.bar(places, counts / counts.sum(), 0.8, color=colours["accent"])
    axes.set_xticks(places, names[: len(counts)])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("share of rows")
    axes.set_xlabel("documents in a row")


def _learnt(axes: Axes, learnt: np.ndarray, colours: dict[str, str]) -> None:
    counts, edges = np.histogram(learnt, np.linspace(0, 1, 21))
    axes.bar(edges[:-1] + 0.025, counts / counts.sum(), 0.0425, color=colours["loop-1"])
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("share of a row's tokens that carry loss")


class SourceShare(NamedTuple):
    """What one source gives to some rows of a mixture.

    `configured` and `observed` are shares of the rows; `tokens` (without padding) is reckoned
    with the source's mean row; epochs are how often it has been read through before and after.
    """

    source: str
    configured: float
    observed: float
    rows: int
    tokens: int
    epochs_before: float
    epochs_after: float


def mixture_shares(mixture: Mixture, start: int, num_rows: int) -> list[SourceShare]:
    """What each source gives to the `num_rows` rows of a mixture from row `start` on."""
    before, after = mixture.order.given(start), mixture.order.given(start + num_rows)
    epochs_before, epochs_after = mixture.epochs(start), mixture.epochs(start + num_rows)
    shares = []
    for source, summary in mixture.describe().items():
        rows = after[source] - before[source]
        shares.append(
            SourceShare(
                source,
                configured=summary.weight,
                observed=rows / num_rows,
                rows=rows,
                tokens=round(rows * summary.tokens / summary.rows),
                epochs_before=epochs_before[source],
                epochs_after=epochs_after[source],
            )
        )
    return shares


def shares_table(shares: list[SourceShare], start: int = 0) -> Table:
    """The shares as a table for the terminal; `start` is the first row, for the title."""
    num_rows = sum(share.rows for share in shares)
    table = Table(
        title=f"what rows {start:,} to {start + num_rows - 1:,} are made of",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("source", overflow="fold")
    for name in ("configured, %", "observed, %", "rows", "tokens", "epochs"):
        table.add_column(name, justify="right", no_wrap=True)
    for share in shares:
        table.add_row(
            share.source,
            f"{100 * share.configured:.2f}",
            f"{100 * share.observed:.2f}",
            f"{share.rows:,}",
            short_count(share.tokens),
            f"{share.epochs_before:.3f} → {share.epochs_after:.3f}",
        )
    return table
