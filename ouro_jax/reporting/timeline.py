"""The figure of a run over wall time: progress of its attempts, what happened, where time went."""

import math
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from ouro_jax.reporting import plots
from ouro_jax.reporting.attempts import HAPPENINGS, Attempt
from ouro_jax.reporting.history import RunHistory, time_unit
from ouro_jax.reporting.plots import ACCENT, FAINT, INK, PART_COLOURS, Canvas, loop_colour
from ouro_jax.training.timing import LOST_PARTS, PARTS, time_spent

# What each kind of happening is called in the figure, its marker and its colour.
LANES = dict(zip(HAPPENINGS, (
    ("killed", "X", INK), ("failed", "P", loop_colour(2)), ("stopped", "s", FAINT),
    ("rolled back", "<", loop_colour(4)), ("rows skipped", "v", loop_colour(1)),
    ("set aside", "h", loop_colour(7)), ("config changed", "D", loop_colour(6)),
    ("alarm", "^", loop_colour(3)), ("bad row", "o", loop_colour(8)),
), strict=True))  # fmt: skip
LANE_HEIGHT, LETTER_WIDTH, LABELS_WIDTH = 21, 7, 110  # CSS pixels
Place = Callable[[Iterable[float]], np.ndarray]


def timeline(run: RunHistory, canvas: Canvas) -> Figure:
    """Steps over wall time, a lane for each kind of happening, and the split of the time."""
    attempts, happened = run.timeline.attempts, run.timeline.counts
    lanes = [kind for kind in HAPPENINGS if happened[kind]]
    first, last = attempts[0].began, max(attempt.ended for attempt in attempts)
    size, unit = time_unit(last - first)
    heights = [260, LANE_HEIGHT * len(lanes) + 6, 64] if lanes else [260, 64]
    figure = canvas.figure(sum(heights) + (190 if canvas.narrow else 100))
    top, *middle, bottom = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)

    def place(moments: Iterable[float]) -> np.ndarray:
        return (np.array(list(moments), float) - first) / size

    top.set_xlim(0, max(last - first, 1.0) / size)
    for axes in (top, *middle):
        _stops(axes, attempts, place)
    _progress(top, attempts, place)
    _checkpoints(top, run, canvas, place)
    _stages(top, run, canvas, place)
    for axes in middle:
        _lanes(axes, run, lanes, canvas, place)
    _split(bottom, run, np.linspace(first, last, canvas.points // 4 + 1), place)
    for axes in (top, *middle):
        axes.tick_params(labelbottom=False)
    began = datetime.fromtimestamp(first, UTC).strftime("%Y-%m-%d %H:%M UTC")
    bottom.set_xlabel(f"{unit} since {began}")
    plots.legend(figure, bottom, canvas, others=[top])
    return figure


def _stops(axes: Axes, attempts: list[Attempt], place: Place) -> None:
    for before, after in pairwise(attempts):
        # The edge keeps a stop of minutes visible in a run of months.
        left, right = place((before.ended, max(after.began, before.ended)))
        axes.axvspan(left, right, color=PART_COLOURS["stopped"], alpha=0.16, linewidth=0.8)


def _progress(axes: Axes, attempts: list[Attempt], place: Place) -> None:
    """Climbs, those steps in another colour that a later attempt or a rollback trained again."""
    climbs = [climb for attempt in attempts for climb in attempt.climbs]
    for before, after in pairwise(climbs):
        moments, steps = zip(before[-1], after[0], strict=True)
        axes.plot(place(moments), steps, color=FAINT, linewidth=0.8, linestyle=":")
    kept_until = math.inf
    for climb in reversed(climbs):
        moments, steps = np.array(climb, float).T
        # What was written just after a rollback may still tell the step before it.
        steps = np.minimum.accumulate(steps[::-1])[::-1]
        axes.plot(place(moments), steps, color=ACCENT)
        if steps[-1] > kept_until:
            again = steps > kept_until
            low = max(kept_until, steps[0])
            crossing = np.interp(low, steps, moments)
            axes.plot(
                place([crossing, *moments[again]]), [low, *steps[again]],
                color=PART_COLOURS["repeated"],
            )  # fmt: skip
        kept_until = min(kept_until, steps[0])
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.06 * (high - low), high)  # room for the checkpoints' ticks
    axes.set_ylabel("step")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(plots.short_tick))


def _checkpoints(axes: Axes, run: RunHistory, canvas: Canvas, place: Place) -> None:
    for permanent, height in ((False, 0.025), (True, 0.06)):
        moments = [
            event["time"] for event in run.timeline.events
            if event["kind"] == "checkpoint" and event["permanent"] == permanent
        ]  # fmt: skip
        x = _apart(axes, place(moments), canvas)
        # One line with gaps: a path for each tick would make the page heavy.
        axes.plot(
            np.repeat(x, 3), np.tile([0, height, np.nan], len(x)), color=INK, linewidth=0.8,
            alpha=0.9 if permanent else 0.5, transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _stages(axes: Axes, run: RunHistory, canvas: Canvas, place: Place) -> None:
    begun = {e["stage"]: e["time"] for e in run.events if e["event"] == "stage_start"}
    width = canvas.width - LABELS_WIDTH
    levels: list[float] = []  # in pixels, where the last name of each level ends
    for name, moment in begun.items():
        x = max(float(place([moment])[0]), 0.0)
        axes.axvline(x, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        left, length = x / axes.get_xlim()[1] * width, LETTER_WIDTH * len(name)
        at_the_edge = left + length > width
        left -= length if at_the_edge else 0
        level = next((n for n, end in enumerate(levels) if end < left), len(levels))
        levels[level : level + 1] = [left + length]
        axes.annotate(
            name, (x, 1), (0, 3 + 14 * level), xycoords=axes.get_xaxis_transform(),
            textcoords="offset points", color=FAINT, fontsize=11,
            ha="right" if at_the_edge else "left",
        )  # fmt: skip


def _lanes(axes: Axes, run: RunHistory, lanes: list[str], canvas: Canvas, place: Place) -> None:
    names = []
    for lane, kind in enumerate(lanes):
        name, marker, colour = LANES[kind]
        moments = [event["time"] for event in run.timeline.happenings if event["kind"] == kind]
        x = _apart(axes, place(moments), canvas)
        axes.plot(x, np.full(len(x), lane), marker, color=colour, markersize=6, clip_on=False)
        names.append(f"{name} · {len(moments):,}")
    axes.set_yticks(range(len(lanes)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(lanes) - 0.4, -0.6)


def _apart(axes: Axes, x: np.ndarray, canvas: Canvas) -> np.ndarray:
    """Of places nearer to each other than two pixels, one: more could not be told apart."""
    pixels = np.round(x / axes.get_xlim()[1] * canvas.width / 2)
    return x[np.unique(pixels, return_index=True)[1]]


def _split(axes: Axes, run: RunHistory, edges: np.ndarray, place: Place) -> None:
    """Shares of the wall time between neighbouring edges, by what it went to, stacked."""
    records = [record for record in run.times if record["kind"] in ("attempt", "window")]
    # A record as its own stage: so what it added to each part is known, not the sums alone.
    each = time_spent(record | {"stage": str(n)} for n, record in enumerate(run.times))
    parts = (*PARTS, *LOST_PARTS)
    passed = np.cumsum([[spent[part] for part in parts] for spent in each.values()], axis=0)
    moments = np.maximum.accumulate([record["time"] for record in records])
    seconds = np.diff([np.interp(edges, moments, column) for column in passed.T], axis=1)
    shares = seconds / np.maximum(seconds.sum(0), 1e-9)
    tops = np.cumsum(shares, axis=0)
    for part, top, share in zip(parts, tops, shares, strict=True):
        if share.any():
            axes.stairs(
                top, place(edges), baseline=top - share, fill=True, color=PART_COLOURS[part],
                label=part,
            )  # fmt: skip
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_locator(NullLocator())
    axes.set_ylabel("time", rotation=0, ha="right", va="center")
