"""What the runs of a sweep came to: a table, results.csv, results.json and results.png."""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from rich import box
from rich.table import Table

from ouro_jax.reporting.data import light_colours
from ouro_jax.reporting.heldout import latest_rows
from ouro_jax.reporting.history import short_count, sort_records
from ouro_jax.reporting.plots import STAND_INS, STYLE, WIDE
from ouro_jax.training.run_log import FILE_NAME, read_log

LOGARITHMIC_FROM = 5  # largest value of an axis over its smallest


@dataclass(frozen=True)
class SweepResult:
    """One run: what it overrides (`labels`) and where it stands.

    From the last held-out measurement, as means over its sources: bits per byte at the trained
    depth, nats per token after each loop up to it, the exit depth. Tokens per second are the
    median of the last stage. None, or empty, where nothing was measured.
    """

    name: str
    labels: Mapping[str, Any]
    status: str
    bits_per_byte: float | None = None
    loss_per_loop: tuple[float, ...] = ()
    exit_depth: float | None = None
    tokens_per_second: float | None = None

    def columns(self) -> dict[str, Any]:
        """The result as one flat row."""
        losses = {f"loss_{loop}": loss for loop, loss in enumerate(self.loss_per_loop, start=1)}
        return {
            "run": self.name, **self.labels, "status": self.status,
            "bits_per_byte": self.bits_per_byte, **losses, "exit_depth": self.exit_depth,
            "tokens_per_second": self.tokens_per_second,
        }  # fmt: skip


def read_result(name: str, labels: Mapping[str, Any], folder: Path) -> SweepResult:
    """The result of the run in `folder`: finished, unfinished, or not started."""
    if not (folder / FILE_NAME).is_file():
        return SweepResult(name, labels, "not started")
    run = sort_records(read_log(folder))
    status = "finished" if run.finished else "unfinished"
    if not run.measured:
        return SweepResult(name, labels, status)
    heldout = list(run.measured[-1].heldout.values())
    loops = min(min(record["trained_loops"], len(record["loss_per_loop"])) for record in heldout)
    losses = zip(*(record["loss_per_loop"][:loops] for record in heldout), strict=True)
    speeds = [record["tokens_per_second"] for record in run.stages[-1].train]
    speeds = [speed for speed in speeds if speed is not None]
    return SweepResult(
        name, labels, status,
        bits_per_byte=latest_rows(run)[-1].at_depth,
        loss_per_loop=tuple(statistics.fmean(per_source) for per_source in losses),
        exit_depth=statistics.fmean(record["mean_depth"] for record in heldout),
        tokens_per_second=statistics.median(speeds) if speeds else None,
    )  # fmt: skip


def write_results(results: Sequence[SweepResult], workdir: Path) -> None:
    """Writes results.json, results.csv and, as soon as a run is measured, results.png."""
    rows = [result.columns() for result in results]
    (workdir / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    longest = max(rows, key=len)
    names = list(dict.fromkeys([*longest, *(name for row in rows for name in row)]))
    with (workdir / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    if any(result.bits_per_byte is not None for result in results):
        draw_results(results, workdir / "results.png")


def results_table(results: Sequence[SweepResult]) -> Table:
    """The results for a terminal; the run with the fewest bits per byte is bold."""
    labels = list(dict.fromkeys(label for result in results for label in result.labels))
    table = Table(
        title="held-out results", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name in (*labels, "bits/byte", "loss per loop", "depth", "tokens/s", ""):
        table.add_column(name, justify="right", no_wrap=name not in labels, overflow="fold")
    best = best_result(results)
    for result in results:
        speed = result.tokens_per_second
        table.add_row(
            *(_value_text(result.labels.get(label, "")) for label in labels),
            _number(result.bits_per_byte, 4),
            " ".join(_number(loss, 3) for loss in result.loss_per_loop),
            _number(result.exit_depth, 2), "–" if speed is None else short_count(speed),
            "" if result.status == "finished" else result.status,
            style="bold" if result is best else "",
        )  # fmt: skip
    return table


def best_result(results: Sequence[SweepResult]) -> SweepResult | None:
    """The finished run with the fewest bits per byte, if one was measured."""
    done = [r for r in results if r.status == "finished" and r.bits_per_byte is not None]
    return min(done, key=lambda result: result.bits_per_byte or 0.0, default=None)


def draw_results(results: Sequence[SweepResult], path: Path) -> None:
    """Draws bits per byte and exit depth over the override with most values, a line per others."""
    results = [result for result in results if result.bits_per_byte is not None]
    x_name, lines = _lines(results)
    colours = light_colours()
    real = {STAND_INS[name]: colour for name, colour in colours.items() if name in STAND_INS}
    with matplotlib.rc_context({key: real.get(value, value) for key, value in STYLE.items()}):
        figure = WIDE.figure(380)
        figure.set_facecolor(colours["paper"])
        figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.12)
        panels = figure.subplots(1, 2)
        for axes, field, title in zip(
            panels, ("bits_per_byte", "exit_depth"), ("held-out bits per byte", "mean exit depth"),
            strict=True,
        ):  # fmt: skip
            axes.set_title(title, loc="left", fontsize=13)
            axes.set_xlabel(x_name)
            _draw_lines(axes, x_name, lines, field, colours)
        if len(lines) > 1:
            handles, texts = panels[0].get_legend_handles_labels()
            figure.legend(handles, texts, loc="outside lower center", ncols=min(len(lines), 4))
        figure.savefig(path, dpi=144)


def _lines(results: Sequence[SweepResult]) -> tuple[str, dict[str, list[SweepResult]]]:
    """The label for the x axis, and the results by what else they override."""
    values = {}
    for result in results:
        for label in result.labels:
            values.setdefault(label, set()).add(_value_text(result.labels[label]))
    x_name = max(values, key=lambda label: len(values[label]), default="")
    lines: dict[str, list[SweepResult]] = {}
    for result in results:
        others = ", ".join(
            f"{label} = {_value_text(value)}"
            for label, value in result.labels.items()
            if label != x_name and len(values[label]) > 1
        )
        lines.setdefault(others, []).append(result)
    return x_name, lines


def _draw_lines(
    axes: Axes, x_name: str, lines: dict[str, list[SweepResult]], field: str, colours: dict
) -> None:
    values = [result.labels.get(x_name, "–") for line in lines.values() for result in line]
    numbers = all(isinstance(value, int | float) for value in values)
    for index, (others, line) in enumerate(lines.items()):
        points = [(result.labels.get(x_name, "–"), getattr(result, field)) for result in line]
        # Matplotlib places texts one after the other.
        points = sorted(points) if numbers else [(_value_text(x), y) for x, y in points]
        axes.plot(*zip(*points, strict=True), "o-", color=colours[f"loop-{index * 3 % 8 + 1}"],
                  label=others)  # fmt: skip
    if numbers:
        if min(values) > 0 and max(values) / min(values) >= LOGARITHMIC_FROM:
            axes.set_xscale("log")
        axes.set_xticks(values, map(_value_text, values))
        axes.xaxis.set_minor_locator(NullLocator())


def _value_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
