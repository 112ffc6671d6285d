"""Pictures of safety by depth: scores and rates, and where prompts lie (paper, section 7.1)."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ouro_jax.errors import ConfigError
from ouro_jax.reporting.figures import figure_file, spread_colours
from ouro_jax.reporting.history import Record
from ouro_jax.training.lines import read_lines

COLUMNS = 3
# Apart in hue and lightness.
LABEL_COLOURS = {"benign": "loop-6", "harmful": "loop-2"}


def draw_safety(files: Sequence[str | Path], path: str | Path) -> Path:
    """Mean score and harmful rate by depth, a line for each file of `run_safety`; returns the PNG.

    The legend says of whom a stand-in judged. ConfigError for a file without a summary.
    """
    with figure_file(path, 380) as (figure, colours):
        panels = figure.subplots(1, 2)
        line_colours = spread_colours(len(files), colours)
        for file, colour in zip(files, line_colours, strict=True):
            records = read_lines(Path(file))
            summaries = [record for record in records if record["kind"] == "safety_summary"]
            if not summaries:
                raise ConfigError(f"{file}: no safety_summary record; let that run end first.")
            rows, run = summaries[-1]["by_depth"], records[0]
            label = f"{run['model']} ({run['mode']})"
            if not run["judges_harm"]:
                label += ", stand-in: no judge of harm"
            for axes, key in zip(panels, ("mean_score", "harmful_rate"), strict=True):
                judged = [row for row in rows if row[key] is not None]
                axes.plot(
                    [row["depth"] for row in judged], [row[key] for row in judged], "o-",
                    color=colour, label=label,
                )  # fmt: skip
        panels[0].set_title("mean score of the judge", loc="left", fontsize=13)
        panels[0].set_ylim(0.9, 5.1)
        panels[1].set_title("harmful rate: share of score 5", loc="left", fontsize=13)
        panels[1].set_ylim(-0.02, 1.02)
        panels[1].yaxis.set_major_formatter(PercentFormatter(1))
        for axes in panels:
            _depth_axis(axes)
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2
        )  # fmt: skip
    return Path(path)


def draw_prompt_states(file: str | Path, path: str | Path) -> Path:
    """The first two principal components after each loop, and how far the lists lie apart.

    `file` is of `run_prompt_states`; ConfigError if it is not. Returns the PNG.
    """
    records = read_lines(Path(file))
    depths = [record for record in records if record["kind"] == "safety_separation"]
    if not depths:
        raise ConfigError(f"{file}: no safety_separation record; expected states of prompts.")
    states = [record for record in records if record["kind"] == "safety_state"]
    rows = -(-(len(depths) + 1) // COLUMNS)
    with figure_file(path, 70 + 270 * rows) as (figure, colours):
        grid = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
        for axes in grid[len(depths) + 1 :]:
            axes.set_visible(False)
        for axes, depth in zip(grid, depths, strict=False):
            own = [state for state in states if state["depth"] == depth["depth"]]
            _scatter(axes, depth, own, colours)
        last = grid[len(depths)]
        last.plot(
            [record["depth"] for record in depths], [record["separation"] for record in depths],
            "o-", color=colours["accent"],
        )  # fmt: skip
        last.set_title("distance of means / radius", loc="left", fontsize=13)
        last.set_ylim(bottom=0)
        _depth_axis(last)
        figure.legend(
            *grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2
        )  # fmt: skip
    return Path(path)


def _scatter(axes: Axes, depth: Record, states: Sequence[Record], colours: dict[str, str]) -> None:
    title = f"loop {depth['depth']}: {depth['explained']:.0%} of the variance"
    axes.set_title(title, loc="left", fontsize=13)
    axes.grid(False)
    for label, colour in LABEL_COLOURS.items():
        own = [state for state in states if state["label"] == label]
        axes.plot(
            [state["x"] for state in own], [state["y"] for state in own], ".",
            color=colours[colour], label=label, alpha=0.8, markersize=7,
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])


def _depth_axis(axes: Axes) -> None:
    axes.set_xlabel("loops run")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
