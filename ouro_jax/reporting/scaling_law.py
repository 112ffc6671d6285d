"""Pictures of a scaling law's fits: predicted against measured loss, and the loss by tokens."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from ouro_jax.errors import ConfigError
from ouro_jax.reporting.figures import figure_file
from ouro_jax.reporting.history import Record, short_count
from ouro_jax.reporting.plots import MAX_LOOP_COLOURS, short_tick
from ouro_jax.training.lines import read_lines

COLUMNS = 3


def draw_scaling_law(records_file: str | Path, path: str | Path) -> Path:
    """Draws what `run_scaling_law` wrote into a new PNG, and returns its path.

    The first row of panels: predicted against measured, one panel a law. Then the total loss by
    tokens, a panel for each size and a colour for each T_m: points measured, lines fitted.
    ConfigError if the file holds no law.
    """
    records = read_lines(Path(records_file))
    laws = [record for record in records if record["kind"] == "scaling_law"]
    if not laws:
        raise ConfigError(f"{records_file}: no scaling_law record; expected a file of those fits.")
    points = [record for record in records if record["kind"] == "scaling_point"]
    total = [point for point in points if point["law"] == "total"]
    sizes = sorted({point["parameters"] for point in total})
    law_rows, size_rows = -(-len(laws) // COLUMNS), -(-len(sizes) // COLUMNS)
    with figure_file(path, 70 + 290 * (law_rows + size_rows)) as (figure, colours):
        grid = figure.subplots(law_rows + size_rows, COLUMNS, squeeze=False).flatten()
        for axes in grid:
            axes.set_visible(False)
        for axes, law in zip(grid, laws, strict=False):
            own = [point for point in points if _place(point) == _place(law)]
            _draw_fit(axes, law, own, colours)
        bottom = grid[law_rows * COLUMNS :]
        for axes, size in zip(bottom, sizes, strict=False):
            _draw_size(axes, size, [p for p in total if p["parameters"] == size], colours)
        lows, highs = zip(*(axes.get_ylim() for axes in bottom[: len(sizes)]), strict=True)
        for axes in bottom:
            axes.set_ylim(min(lows), max(highs))
        loops = sorted({point["loops"] for point in points})
        dots = [
            Line2D(
                [], [], color=_loop_colour(each, colours), marker=".", ls="", label=f"T = {each}"
            )
            for each in loops
        ]
        figure.legend(handles=dots, loc="outside lower center", ncols=8)
    return Path(path)


def _place(record: Record) -> tuple:
    return record["law"], record["trained_loops"]


def _draw_fit(axes: Axes, law: Record, points: Sequence[Record], colours: dict[str, str]) -> None:
    """Predicted against measured, a colour for each T, and the line on which they are equal."""
    axes.set_visible(True)
    total = law["trained_loops"] is None
    name = "total loss" if total else f"loss after T of {law['trained_loops']}"
    axes.set_title(f"{name}: R² = {law['r2']:.4f}", loc="left", fontsize=13)
    values = [point[key] for point in points for key in ("loss", "predicted")]
    axes.plot([min(values), max(values)], [min(values), max(values)], color=colours["faint"], lw=1)
    for loops in sorted({point["loops"] for point in points}):
        own = [point for point in points if point["loops"] == loops]
        axes.plot(
            [point["loss"] for point in own], [point["predicted"] for point in own], ".",
            color=_loop_colour(loops, colours), markersize=6, alpha=0.8,
        )  # fmt: skip
    axes.set_xlabel("measured, nats per token")
    axes.set_ylabel("predicted")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))


def _draw_size(axes: Axes, size: int, points: Sequence[Record], colours: dict[str, str]) -> None:
    """The total loss of one size by tokens: points of each T_m and the fitted line."""
    axes.set_visible(True)
    axes.set_title(f"N = {short_count(size)}", loc="left", fontsize=13)
    ordered = sorted(points, key=lambda point: (point["loops"], point["run"], point["tokens"]))
    for (loops, _), group in itertools.groupby(ordered, lambda p: (p["loops"], p["run"])):
        own, colour = list(group), _loop_colour(loops, colours)
        tokens = [point["tokens"] for point in own]
        axes.plot(tokens, [p["loss"] for p in own], ".", color=colour, markersize=6, alpha=0.8)
        axes.plot(tokens, [p["predicted"] for p in own], color=colour)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(FuncFormatter(short_tick))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens")
    axes.set_ylabel("total loss")


def _loop_colour(loops: int, colours: dict[str, str]) -> str:
    return colours[f"loop-{min(loops, MAX_LOOP_COLOURS)}"]
