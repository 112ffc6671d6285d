"""The figures of an experiment: models side by side, along an axis, and by depth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ouro_jax.reporting.figures import figure_file
from ouro_jax.reporting.plots import STAND_INS, Canvas


@dataclass(frozen=True)
class Results:
    """Of one held-out set: entries of `summarise`, records of each run and depth, and the axis."""

    summary: Sequence[Mapping[str, Any]]
    records: Sequence[Mapping[str, Any]]
    axis: str

    def models(self) -> list[tuple[int, int]]:
        """(layers, loops) of all models; fewest FLOPs first, looped ones last among equals."""
        found = {(entry["layers"], entry["loops"]) for entry in self.summary}
        return sorted(found, key=lambda model: (model[0] * model[1], model[1]))

    def colour(self, model: tuple[int, int], colours: Mapping[str, str]) -> str:
        """The colour of a model: looped ones take the loops' colours, the others grey or blue."""
        if model[1] > 1:
            return colours[f"loop-{min(model[1], 8)}"]
        plain = [other for other in self.models() if other[1] == 1]
        return colours["faint"] if model == plain[0] else colours["accent"]


def _reference(axes: Axes, results: Results, colours: Mapping[str, str]) -> None:
    """A dashed line where chance is, or all that there is to know."""
    entry = results.summary[0]
    axes.axhline(entry["reference_value"], color=colours["ink"], linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        entry["reference"], (1, entry["reference_value"]), xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points", ha="right", color=colours["faint"], fontsize=11,
    )  # fmt: skip
    axes.set_ylim(0, 1.02 if entry["metric"] == "exact match" else None)
    axes.set_ylabel(entry["metric"])


def draw_models(results: Results, canvas: Canvas, colours: Mapping[str, str] = STAND_INS) -> Figure:
    """A bar a model for the mean over seeds, a dot a seed."""
    figure = canvas.figure(340)
    axes = figure.subplots()
    _bars(axes, results, colours)
    return figure


def _bars(axes: Axes, results: Results, colours: Mapping[str, str]) -> None:
    order = results.models()
    for entry in results.summary:
        model = (entry["layers"], entry["loops"])
        place, colour = order.index(model), results.colour(model, colours)
        axes.bar(place, entry["mean"], width=0.6, color=colour, alpha=0.35)
        count = len(entry["seeds"])
        spots = [place + 0.12 * (index - (count - 1) / 2) for index in range(count)]
        axes.plot(spots, entry["seeds"], "o", color=colour, markersize=6)
    roles = {(entry["layers"], entry["loops"]): entry["role"] for entry in results.summary}
    axes.set_xticks(
        range(len(order)),
        [f"{layers} x {loops}\n{roles[layers, loops]}" for layers, loops in order],
    )
    _reference(axes, results, colours)


def draw_axis(results: Results, canvas: Canvas, colours: Mapping[str, str] = STAND_INS) -> Figure:
    """Mean of each model along the experiment's axis, its seeds as a band."""
    figure = canvas.figure(380)
    _lines(figure.subplots(), results, colours)
    return figure


def _lines(axes: Axes, results: Results, colours: Mapping[str, str]) -> None:
    for model in results.models():
        entries = sorted(
            (e for e in results.summary if (e["layers"], e["loops"]) == model),
            key=lambda entry: entry["axis"],
        )
        places = [entry["axis"] for entry in entries]
        colour = results.colour(model, colours)
        low, high = ([pick(e["seeds"]) for e in entries] for pick in (min, max))
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        label = f"{model[0]} x {model[1]}, {entries[0]['role']}"
        axes.plot(places, [e["mean"] for e in entries], "o-", color=colour, label=label)
    axes.set_xlabel(results.axis.replace("_", " "))
    _reference(axes, results, colours)
    axes.legend(loc="upper left")


def draw_depth(results: Results, canvas: Canvas, colours: Mapping[str, str] = STAND_INS) -> Figure:
    """Every run after 1, 2, 3 … loops; a dot where it was trained."""
    figure = canvas.figure(340)
    _depth(figure.subplots(), results, colours)
    return figure


def _depth(axes: Axes, results: Results, colours: Mapping[str, str]) -> None:
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for record in results.records:
        runs.setdefault(record["run"], []).append(record)
    labelled = set()
    for records in runs.values():
        records = sorted(records, key=lambda record: record["loops"])
        model = (records[0]["layers"], records[0]["trained_loops"])
        colour = results.colour(model, colours)
        depths, values = [r["loops"] for r in records], [r["value"] for r in records]
        label = "" if model in labelled else f"trained as {model[0]} x {model[1]}"
        labelled.add(model)
        axes.plot(depths, values, color=colour, label=label or None, alpha=0.8)
        trained = [(r["loops"], r["value"]) for r in records if r["loops"] == r["trained_loops"]]
        axes.plot(*zip(*trained, strict=True), "o", color=colour)
    axes.set_xlabel("loops run")
    _reference(axes, results, colours)
    axes.legend(loc="best")


class Plot(NamedTuple):
    """A figure of the page, what to look for in it, and whether the results have it."""

    title: str
    draw: Callable[[Results, Canvas], Figure]
    look_for: str
    shows: Callable[[Results], bool]


PLOTS = (
    Plot(
        "Models side by side", draw_models,
        "A bar is the mean over seeds of the best learning rate, a dot one seed. Look for the "
        "looped model to stand above the one with as many parameters, by more than the seeds lie "
        "apart.",
        lambda results: not results.axis,
    ),
    Plot(
        "Along the axis", draw_axis,
        "Mean over seeds, shaded from the worst to the best seed. Look for the looped models to "
        "rise further to the left: they need less.",
        lambda results: bool(results.axis),
    ),
    Plot(
        "By depth", draw_depth,
        "Each line is one run, read out after every number of loops; the dot is the depth it was "
        "trained for. Look for a climb up to the dot, and for what becomes of it beyond.",
        lambda results: any(record["trained_loops"] > 1 for record in results.records),
    ),
)  # fmt: skip


def save_png(results: Results, path: Path) -> Path:
    """The first figure that the results have and the one by depth, side by side, as a picture."""
    with figure_file(path, 400) as (figure, colours):
        left, right = figure.subplots(1, 2)
        (_lines if results.axis else _bars)(left, results, colours)
        _depth(right, results, colours)
    return path
