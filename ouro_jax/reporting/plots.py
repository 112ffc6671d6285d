"""The report's figures, as SVG to be put inside a page.

Colours are stand-ins that become the page's CSS variables, and text stays text in the page's
font, so one drawing serves the light and the dark theme. One unit is one CSS pixel.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from ouro_jax.reporting.heldout import heldout_rows
from ouro_jax.reporting.history import Record, RunHistory, StageHistory, short_count, short_time
from ouro_jax.training.timing import LOST_PARTS, PARTS

T = TypeVar("T")
MAX_LOOP_COLOURS = 8
# Matplotlib wants real colours; no two of these, nor any of its own, are equal.
STAND_INS = {
    "ink": "#0a0b01", "faint": "#0a0b02", "line": "#0a0b03", "band": "#0a0b04",
    "accent": "#0a0b05",
    **{f"loop-{loop}": f"#0b0c{loop:02x}" for loop in range(1, MAX_LOOP_COLOURS + 1)},
}  # fmt: skip
INK, FAINT, LINE, BAND, ACCENT = (
    STAND_INS[name] for name in ("ink", "faint", "line", "band", "accent")
)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 12.0,
    "text.color": INK, "axes.labelcolor": FAINT, "axes.edgecolor": LINE, "xtick.color": LINE,
    "ytick.color": LINE, "xtick.labelcolor": FAINT, "ytick.labelcolor": FAINT,
    "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": LINE, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 12.0,
    "lines.linewidth": 1.6, "lines.solid_capstyle": "round",
}  # fmt: skip
# What time went to has the same colour in every figure.
PART_COLOURS = dict(zip((*PARTS, *LOST_PARTS), (
    ACCENT, *(STAND_INS[f"loop-{n}"] for n in (1, 2, 7, 8)), FAINT,
    *(STAND_INS[f"loop-{n}"] for n in (3, 4)),
), strict=True))  # fmt: skip
PIXELS_PER_INCH = 72
# No stage is drawn narrower than this share of the width: 20B of 7.7T tokens would be 3 pixels.
MIN_STAGE_SHARE = 0.1


@dataclass(frozen=True)
class Canvas:
    """The space of a figure, in CSS pixels; `points` is how many averages a curve has at most."""

    name: str
    width: int
    points: int

    @property
    def narrow(self) -> bool:
        """Whether it is for a telephone."""
        return self.width < 600

    def figure(self, height: int) -> Figure:
        """An empty figure of this width."""
        size = (self.width / PIXELS_PER_INCH, height / PIXELS_PER_INCH)
        return Figure(figsize=size, layout="constrained")


WIDE, NARROW = Canvas("wide", 960, 500), Canvas("narrow", 360, 160)


class TokenAxis:
    """The x axis of a run: tokens, stage by stage, short stages widened to stay visible."""

    def __init__(self, stages: Sequence[StageHistory], canvas: Canvas):
        spans = np.array([max(stage.end - stage.start, 1) for stage in stages], float)
        shares = np.maximum(spans / spans.sum(), MIN_STAGE_SHARE)
        self.stages, self.canvas = stages, canvas
        self.edges = np.concatenate([[0.0], np.cumsum(shares / shares.sum())])

    def place(self, index: int, tokens: np.ndarray) -> np.ndarray:
        """Where points of stage `index` lie, from 0 to 1."""
        stage, left, right = self.stages[index], self.edges[index], self.edges[index + 1]
        span = max(stage.end - stage.start, 1)
        return left + (tokens - stage.start) / span * (right - left)

    def dress(self, axes: Axes, names: bool = True, ticks: bool = True) -> None:
        """Draws the stages as bands with their names, and ticks in tokens at their ends."""
        axes.set_xlim(0, 1)
        for index, stage in enumerate(self.stages):
            left, right = self.edges[index], self.edges[index + 1]
            if index % 2:
                axes.axvspan(left, right, color=BAND, zorder=0, linewidth=0)
            if names:
                axes.text(
                    (left + right) / 2, 1.02, stage.name, transform=axes.get_xaxis_transform(),
                    ha="center", va="bottom", color=FAINT, fontsize=11,
                    rotation=90 if self.canvas.narrow else 0,
                )  # fmt: skip
        counts = [self.stages[0].start, *(stage.end for stage in self.stages)]
        labels = [short_count(count) for count in counts] if ticks else [""] * len(counts)
        axes.set_xticks(self.edges, labels, rotation=90 if self.canvas.narrow else 0)
        if ticks:
            axes.set_xlabel("tokens seen")


def svg(draw: Callable[[T, Canvas], Figure], drawn: T, canvas: Canvas) -> str:
    """Draws a figure and returns its `<svg>` element, for a page that has the CSS variables."""
    # Element ids are hashed with the salt: unlike in every other figure of the page.
    salt = f"{draw.__name__}-{canvas.name}"
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure, buffer = draw(drawn, canvas), io.StringIO()
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    return _for_a_page(buffer.getvalue(), canvas)


def _for_a_page(text: str, canvas: Canvas) -> str:
    """Matplotlib's SVG file as an element: no header, names of groups or needless digits."""
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None, "matplotlib writes a viewBox"
    body = text[text.index(">", view_box.end()) + 1 :]
    # Groups are numbered ("axes_1"), the same in every figure, and used by none.
    needless = r'<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>|\sid="[\w.]+_\d+"'
    body = re.sub(needless, "", body, flags=re.DOTALL)
    body = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)
    body = re.sub(r"\s*\n\s*", " ", body)
    for name, stand_in in STAND_INS.items():
        body = body.replace(stand_in, f"var(--{name})")
    return f'<svg class="{canvas.name}" {view_box[0]} aria-hidden="true">{body.strip()}'


def loss_per_loop(run: RunHistory, canvas: Canvas) -> Figure:
    """Training loss after each loop, over the stages."""
    figure, axes, axis = _over_stages(run, canvas, 330)
    for index in range(len(axis.stages)):
        x, values = _curves(axis, index, _per_loop(axis, index, "loss_per_loop", math.nan))
        for loop in range(values.shape[1]):
            # Where depths are drawn, some steps have not run this loop.
            ran = np.isfinite(values[:, loop])
            axes.plot(x[ran], values[ran, loop], color=loop_colour(loop + 1),
                      label=f"loop {loop + 1}")  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("nats per token")
    legend(figure, axes, canvas)
    return figure


def exit_distribution(run: RunHistory, canvas: Canvas) -> Figure:
    """The share of tokens that leave after each loop, over the stages."""
    figure, axes, axis = _over_stages(run, canvas, 260)
    axes.grid(False)
    for index in range(len(axis.stages)):
        x, values = _curves(axis, index, _per_loop(axis, index, "exit_distribution", 0.0))
        tops = np.cumsum(values, axis=1)
        for loop in range(values.shape[1]):
            axes.fill_between(
                x, tops[:, loop] - values[:, loop], tops[:, loop], linewidth=0, alpha=0.85,
                color=loop_colour(loop + 1), label=f"loop {loop + 1}",
            )  # fmt: skip
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("share of exits")
    legend(figure, axes, canvas)
    return figure


def mean_depth(run: RunHistory, canvas: Canvas) -> Figure:
    """The mean exit depth, and the loops that there are."""
    figure, axes, axis = _over_stages(run, canvas, 220)
    for index, stage in enumerate(axis.stages):
        x, values = _curves(axis, index, lambda record: [record["mean_depth"]])
        axes.plot(x, values[:, 0], color=ACCENT, label="mean exit depth")
        loops = _most_loops(stage)
        axes.hlines(
            loops, axis.edges[index], axis.edges[index + 1], color=FAINT, linestyle=(0, (4, 3)),
            linewidth=1.2, label="loops of the stage",
        )  # fmt: skip
    axes.set_ylim(bottom=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loops")
    legend(figure, axes, canvas)
    return figure


def heldout_by_depth(run: RunHistory, canvas: Canvas) -> Figure:
    """Held-out bits per byte after loops 1, 2, …: a panel per source, a line per stage."""
    stages = run.measured
    sources = sorted({source for stage in stages for source in stage.heldout})
    columns = 1 if canvas.narrow else 2 if len(sources) in (2, 4) else min(len(sources), 3)
    rows = -(-len(sources) // columns)
    figure = canvas.figure(50 + 230 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, source in zip(grid, sources, strict=False):
        for index, stage in enumerate(stages):
            if source in stage.heldout:
                _depth_line(axes, stage, source, 0.3 + 0.7 * (index + 1) / len(stages))
        bigram = run.baselines.get(source, {}).get("bigram_bits_per_byte")
        if bigram is not None:
            axes.axhline(bigram, color=FAINT, linestyle=":", linewidth=1.4, label="bigram model")
        axes.set_title(source, fontsize=12, fontweight="bold", loc="left", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("loops run")
    for axes in grid[len(sources) :]:
        axes.set_visible(False)
    grid[0].set_ylabel("bits per byte")
    legend(figure, grid[0], canvas, others=list(grid[1 : len(sources)]))
    return figure


def _depth_line(axes: Axes, stage: StageHistory, source: str, alpha: float) -> None:
    (row,) = heldout_rows({source: stage.heldout[source]}, {})
    depths = np.arange(1, len(row.bits_per_byte) + 1)
    values = np.array(row.bits_per_byte, float)
    axes.plot(depths, values, color=ACCENT, alpha=alpha, label=stage.name)
    if row.trained_loops <= len(depths):
        axes.plot(
            [row.trained_loops], [values[row.trained_loops - 1]], "o", color=ACCENT, alpha=alpha,
            markersize=6,
        )  # fmt: skip


def learning_rate_and_batch(run: RunHistory, canvas: Canvas) -> Figure:
    """Learning rate, and tokens per optimizer step."""
    panels = (
        ("learning rate", "learning_rate", "{x:g}"),
        ("tokens per batch", "batch_tokens", FuncFormatter(short_tick)),
    )
    return _panels(run, canvas, panels)


def speed(run: RunHistory, canvas: Canvas) -> Figure:
    """Tokens per second and device, and the share of the peak that the model's FLOPs make."""
    peak = _trained(run)[-1].train[-1]["mfu_peak"]
    panels = (
        ("tokens/s per device", "tokens_per_second_per_device", FuncFormatter(short_tick)),
        ("MFU", "mfu", PercentFormatter()),
    )
    figure = _panels(run, canvas, panels)
    figure.axes[1].set_title(f"100 % = {peak}", loc="right", color=FAINT, fontsize=11)
    return figure


def step_seconds(run: RunHistory, canvas: Canvas) -> Figure:
    """Percentiles of the duration of a step, over the stages."""
    figure, axes, axis = _over_stages(run, canvas, 260)
    for name, colour, combine in (
        ("max", loop_colour(3), np.ma.max), ("p99", loop_colour(2), np.ma.max),
        ("p90", loop_colour(1), np.ma.max), ("p50", ACCENT, np.ma.mean),
    ):  # fmt: skip
        for index in range(len(axis.stages)):
            x, values = _curves(
                axis, index, lambda record, name=name: [record["step_seconds"][name]], combine
            )
            axes.plot(x, values[:, 0], color=colour, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("seconds per step")
    legend(figure, axes, canvas)
    return figure


def where_time_went(run: RunHistory, canvas: Canvas) -> Figure:
    """Shares of each stage's wall time, and of the whole run's, as stacked bars."""
    stages = run.timed
    parts = (*PARTS, *LOST_PARTS)
    seconds = np.array([[stage.seconds[part] for part in parts] for stage in stages])
    names = [stage.name for stage in stages]
    if len(stages) > 1:
        names, seconds = [*names, "whole run"], np.vstack([seconds, seconds.sum(0)])
    walls = seconds.sum(1)
    shares = 100 * seconds / walls[:, None]
    figure = canvas.figure(120 + 34 * len(names) + (60 if canvas.narrow else 0))
    axes = figure.subplots()
    left = np.zeros(len(names))
    for place, part in enumerate(parts):
        colour = PART_COLOURS[part]
        axes.barh(names, shares[:, place], left=left, color=colour, height=0.62, label=part)
        left += shares[:, place]
    for row, wall in enumerate(walls):
        axes.text(101, row, short_time(wall), va="center", color=FAINT, fontsize=11)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.grid(False)
    axes.xaxis.set_major_formatter(PercentFormatter())
    axes.set_xlabel("share of wall time")
    legend(figure, axes, canvas)
    return figure


def _panels(run: RunHistory, canvas: Canvas, panels: Sequence[tuple]) -> Figure:
    figure = canvas.figure(150 * len(panels) + (110 if canvas.narrow else 60))
    axis = TokenAxis(_trained(run), canvas)
    rows = figure.subplots(len(panels), 1, sharex=True)
    for place, (axes, (label, name, form)) in enumerate(zip(rows, panels, strict=True)):
        for index in range(len(axis.stages)):
            x, values = _curves(axis, index, lambda record, name=name: [record[name]])
            axes.plot(x, values[:, 0], color=ACCENT)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        axes.yaxis.set_major_formatter(form)
        axis.dress(axes, names=place == 0)
        axes.label_outer()
    return figure


def _over_stages(run: RunHistory, canvas: Canvas, height: int) -> tuple[Figure, Axes, TokenAxis]:
    figure = canvas.figure(height + (90 if canvas.narrow else 30))
    axes, axis = figure.subplots(), TokenAxis(_trained(run), canvas)
    axis.dress(axes)
    return figure, axes, axis


def _trained(run: RunHistory) -> list[StageHistory]:
    return [stage for stage in run.stages if stage.train]


def _most_loops(stage: StageHistory) -> int:
    return max(len(record["loss_per_loop"]) for record in stage.train)


def _per_loop(
    axis: TokenAxis, index: int, name: str, absent: float
) -> Callable[[Record], list[float | None]]:
    """The field `name` of a record, with `absent` for the loops that its step did not run."""
    loops = _most_loops(axis.stages[index])
    return lambda record: record[name] + [absent] * (loops - len(record[name]))


def _curves(
    axis: TokenAxis,
    index: int,
    values_of: Callable[[Record], Sequence[float | None]],
    combine: Callable[..., Any] = np.ma.mean,
) -> tuple[np.ndarray, np.ndarray]:
    """Places x [P] and values [P, K] of a stage, neighbouring records combined (averaged).

    The first and the last average are drawn out to the stage's ends, so P is 2 at least.
    """
    records = axis.stages[index].train
    ends = axis.edges[index : index + 2]
    points = min(len(records), max(2, round(axis.canvas.points * (ends[1] - ends[0]))))
    tokens = np.array([record["tokens"] for record in records], float)
    values = np.array([values_of(record) for record in records], float)
    x = np.array([part.mean() for part in np.array_split(tokens, points)])
    averages = [
        # A null (NaN here) is left out of its average; an average of nulls alone is a gap.
        combine(np.ma.masked_invalid(part), axis=0).filled(np.nan)
        for part in np.array_split(values, points)
    ]
    inner = slice(1, -1) if points > 1 else slice(0)
    places = np.concatenate([ends[:1], axis.place(index, x)[inner], ends[1:]])
    return places, np.stack(averages if points > 1 else 2 * averages)


def loop_colour(loop: int) -> str:
    """The stand-in for the colour of a loop, the same in every figure; the last one repeats."""
    return STAND_INS[f"loop-{min(loop, MAX_LOOP_COLOURS)}"]


def legend(figure: Figure, axes: Axes, canvas: Canvas, others: Sequence[Axes] = ()) -> None:
    """One entry for each label, under the figure."""
    entries = {}
    for each in (axes, *others):
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center",
        ncols=3 if canvas.narrow else 8, handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip


def short_tick(value: float, _: int) -> str:
    """The label of a tick, for a FuncFormatter."""
    return short_count(value)
