"""The figures of `ouro_jax.experiments.exits`: accuracy by depth, and the gate's calibration."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ouro_jax.reporting.figures import figure_file
from ouro_jax.reporting.history import Record

RULES = {
    "static": ("ink", "fixed depth"), "q": ("loop-4", "Q-exit"),
    "lookahead": ("loop-6", "look-ahead"), "hidden": ("loop-8", "hidden difference"),
    "confidence": ("loop-2", "confidence"),
}  # fmt: skip
CHECKPOINT_LINES = ("-", "--", ":", "-.")
PANELS = (("loss", "nats per token"), ("accuracy", "next-token accuracy"))


def draw_exits(records: Sequence[Record], path: str | Path) -> None:
    """Loss and accuracy against mean depth, a line for each rule; checkpoints differ in dashes."""
    records = [record for record in records if record["kind"] == "exits"]
    names = list(dict.fromkeys(record["checkpoint"] for record in records))
    with figure_file(path, 440) as (figure, colours):
        panels = figure.subplots(1, 2)
        for axes, (field, title) in zip(panels, PANELS, strict=True):
            axes.set_title(title, loc="left", fontsize=13)
            axes.set_xlabel("mean depth, loops")
            for record in records:
                points = sorted(record["points"], key=lambda point: point["mean_depth"])
                axes.plot(
                    [point["mean_depth"] for point in points], [point[field] for point in points],
                    marker="o", markersize=6 if record["rule"] == "static" else 3,
                    linestyle=CHECKPOINT_LINES[names.index(record["checkpoint"]) % 4],
                    color=colours[RULES[record["rule"]][0]],
                )  # fmt: skip
        handles = [Line2D([], [], color=colours[c], label=label) for c, label in RULES.values()]
        if len(names) > 1:
            handles += [
                Line2D([], [], color=colours["faint"], linestyle=line, label=name)
                for name, line in zip(names, CHECKPOINT_LINES, strict=False)
            ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)


def draw_calibration(records: Sequence[Record], path: str | Path) -> None:
    """What the gate says of going on against how often it paid, and expected against real loss.

    A row of panels for each checkpoint. Dotted: the target of the paper's eq. 5, whose mean a
    trained gate learns.
    """
    names = list(dict.fromkeys(r["checkpoint"] for r in records if r["kind"] == "calibration"))
    with figure_file(path, 60 + 320 * len(names)) as (figure, colours):
        panels = figure.subplots(len(names), 3, squeeze=False)
        for row, name in zip(panels, names, strict=True):
            mine = [record for record in records if record["checkpoint"] == name]
            for axes, loop in zip(row, ("own", "next"), strict=False):
                bins = [r for r in mine if r["kind"] == "calibration" and r["loop"] == loop]
                _gates(axes, bins[0]["bins"], colours)
                paid = "this loop" if loop == "own" else "the next loop"
                axes.set_ylabel(f"share of tokens that {paid} improved")
            _losses(row[2], next(r for r in mine if r["kind"] == "expected"), colours)
            row[0].set_title(name, loc="left", fontsize=13)


def _gates(axes: Axes, bins: Sequence[Record], colours: dict[str, str]) -> None:
    axes.plot([0, 1], [0, 1], color=colours["line"], linewidth=1)
    for gate in dict.fromkeys(entry["gate"] for entry in bins):
        mine = [entry for entry in bins if entry["gate"] == gate]
        colour = colours[f"loop-{(gate - 1) % 8 + 1}"]
        predicted = [entry["predicted"] for entry in mine]
        axes.plot(predicted, [entry["observed"] for entry in mine], "o-", markersize=4,
                  color=colour, label=f"loop {gate}")  # fmt: skip
        axes.plot(predicted, [entry["target"] for entry in mine], ":", color=colour)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="gate: probability of going on")
    axes.legend()


def _losses(axes: Axes, record: Record, colours: dict[str, str]) -> None:
    expected = [entry["expected"] for entry in record["bins"]]
    axes.plot(expected, expected, color=colours["line"], linewidth=1)
    axes.plot(expected, [entry["realised"] for entry in record["bins"]], "o", markersize=5,
              color=colours["accent"])  # fmt: skip
    axes.set_title(
        f"mean {record['expected']:.3f} expected, {record['realised']:.3f} taken", loc="left",
        fontsize=12,
    )  # fmt: skip
    axes.set(xlabel="expected loss by the gate, nats", ylabel="loss of the exits taken (q = 0.5)")
